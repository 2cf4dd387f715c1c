//! Allreduce of sparse tensors.

use hvd_core::{ProcessSet, ReduceOp};
use tch::{Device, Kind, Tensor};

use super::exchange::grouped_allgather_async;
use super::handle::GroupHandle;
use crate::error::{Error, Result};

/// An allreduce of sparse tensors that is under way. Dropping it does not cancel it.
#[must_use = "the result is there only after `wait`"]
#[derive(Debug)]
pub struct SparseHandle {
    handle: GroupHandle,
    size: Vec<i64>,
    averages: bool,
}

impl SparseHandle {
    /// Whether [`SparseHandle::wait`] would return at once.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for the operation; the sum or average, coalesced.
    ///
    /// # Errors
    /// As [`super::TensorHandle::wait`].
    pub fn wait(self) -> Result<Tensor> {
        let SparseHandle { handle, size, averages } = self;
        let gathered = handle.wait()?;
        let [indices, values, ranks] = &gathered[..] else {
            return Err(Error::invalid("a group of three gave another number of results"));
        };
        tch::no_grad(|| {
            let options = (values.kind(), values.device());
            let sum = Tensor::f_sparse_coo_tensor_indices_size(&indices.f_tr()?, values, &*size, options, false)?;
            let sum = sum.f_coalesce()?;
            Ok(if averages { sum.f_div_scalar(ranks.size()[0])? } else { sum })
        })
    }
}

/// Starts an allreduce of a sparse (COO) tensor: of each rank's entries, whose places and number may differ. Sum or Average
/// over all ranks of the set that have not joined; allgathers, negotiated as one.
///
/// # Errors
/// If the tensor is not sparse or the operation another one.
pub fn sparse_allreduce_async(set: &ProcessSet, tensor: &Tensor, name: &str, op: ReduceOp) -> Result<SparseHandle> {
    if !tensor.is_sparse() {
        return Err(Error::invalid(format!("`{name}` is not sparse; use allreduce")));
    }
    let averages = match op {
        ReduceOp::Sum => false,
        ReduceOp::Average if matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) => true,
        _ => return Err(Error::invalid(format!("`{name}`: sparse tensors of {:?} have no {op:?}", tensor.kind()))),
    };
    let coalesced = tch::no_grad(|| tensor.detach().f_coalesce())?;
    // An entry a row.
    let (indices, values) = (coalesced.f_indices()?.f_tr()?.f_contiguous()?, coalesced.f_values()?);
    // A byte of each rank that has not joined: a rank without entries counts, too.
    let rank = Tensor::f_zeros([1], (Kind::Uint8, Device::Cpu))?;
    let handle = grouped_allgather_async(set, &[&indices, &values, &rank], name)?;
    Ok(SparseHandle { handle, size: tensor.size(), averages })
}

/// The sum or average of the ranks' sparse (COO) tensors, coalesced; see [`sparse_allreduce_async`].
pub fn sparse_allreduce(set: &ProcessSet, tensor: &Tensor, name: &str, op: ReduceOp) -> Result<Tensor> {
    sparse_allreduce_async(set, tensor, name, op)?.wait()
}
