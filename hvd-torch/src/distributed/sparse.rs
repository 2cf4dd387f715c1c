//! A gradient that stays sparse: it has no place in a bucket and travels as indices and values.

use hvd_core::{ProcessSet, ReduceOp};
use tch::{Kind, Tensor};

use crate::autograd::{grad, set_grad};
use crate::error::{Error, Result};
use crate::ops::{SparseHandle, sparse_allreduce_async};

/// A parameter that was declared sparse.
#[derive(Debug)]
pub(super) struct SparseGradient {
    pub name: String,
    /// The name of its reduction, the same on all ranks.
    reduction: String,
    pub param: Tensor,
    /// Backward passes that have reached the parameter since the last step.
    pub fired: usize,
    /// Whether the reduction has begun since the last step.
    pub submitted: bool,
    /// The reduction that is under way.
    pub handle: Option<SparseHandle>,
}

impl SparseGradient {
    pub(super) fn new(optimizer: &str, name: &str, param: &Tensor) -> Result<Self> {
        if param.dim() == 0 {
            return Err(Error::invalid(format!("`{name}` was declared sparse, but has no rows")));
        }
        let reduction = format!("{optimizer}.sparse.{name}");
        let param = param.shallow_clone();
        Ok(SparseGradient { name: name.into(), reduction, param, fired: 0, submitted: false, handle: None })
    }

    /// Starts the reduction among `set`; without one the gradient only gets the form that it has after a reduction.
    pub(super) fn submit(&mut self, set: Option<&ProcessSet>, op: ReduceOp) -> Result<()> {
        self.submitted = true;
        let own = self.own()?;
        match set {
            Some(set) => self.handle = Some(sparse_allreduce_async(set, &own, &self.reduction, op)?),
            None => set_grad(&self.param, Some(&tch::no_grad(|| own.f_coalesce())?))?,
        }
        Ok(())
    }

    /// The entries of the gradient, which share memory with it; none where there is no gradient.
    pub(super) fn values(&self) -> Result<Option<Tensor>> {
        grad(&self.param)?.map(|grad| Ok(grad.f_values()?)).transpose()
    }

    /// Counts anew.
    pub(super) fn begin(&mut self) {
        (self.fired, self.submitted) = (0, false);
    }

    /// This rank's gradient as a sparse one: without rows where no backward pass has come by, and with all rows where the
    /// parameter was also used in a way that makes a dense gradient.
    fn own(&self) -> Result<Tensor> {
        let param = &self.param;
        tch::no_grad(|| match grad(param)? {
            Some(grad) if grad.is_sparse() => Ok(grad),
            Some(grad) => Ok(grad.f_to_sparse_sparse_dim(1)?),
            None => {
                let indices = Tensor::f_zeros([1, 0], (Kind::Int64, param.device()))?;
                let mut rows = param.size();
                rows[0] = 0;
                let options = (param.kind(), param.device());
                let values = Tensor::f_zeros(&*rows, options)?;
                Ok(Tensor::f_sparse_coo_tensor_indices_size(&indices, &values, param.size(), options, true)?)
            }
        })
    }
}
