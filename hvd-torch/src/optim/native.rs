//! tch's own optimizers behind our trait.

use std::collections::HashMap;

use tch::Tensor;
use tch::nn;

use super::Optimizer;
use crate::error::{Error, Result};

/// An optimizer of `tch::nn` (SGD, Adam, RMSprop, …).
///
/// tch gives no access to the state of its optimizers (momenta, step counts): it can be neither saved nor broadcast.
#[derive(Debug)]
pub struct TchOptimizer {
    inner: nn::Optimizer,
    /// Those that are not frozen.
    params: Vec<(String, Tensor)>,
    /// Number of trainable variables, the frozen ones included.
    variables: usize,
}

impl TchOptimizer {
    /// Wraps `inner`, which was built for `vars`.
    ///
    /// # Errors
    /// If the two do not hold the same parameters.
    pub fn new(inner: nn::Optimizer, vars: &nn::VarStore) -> Result<TchOptimizer> {
        let trainable = inner.trainable_variables();
        let variables = trainable.len();
        let params = name(trainable, vars)?;
        super::check_unique(&params)?;
        Ok(TchOptimizer { inner, params, variables })
    }

    /// The optimizer itself, for instance to set a momentum.
    pub fn inner_mut(&mut self) -> &mut nn::Optimizer {
        &mut self.inner
    }
}

/// The parameters of `vars` that are not frozen, in the order in which they were made.
///
/// `VarStore::variables` is a `HashMap`, whose order differs from process to process; what ranks reduce needs one order.
///
/// # Errors
/// If names occur twice.
pub fn named_parameters(vars: &nn::VarStore) -> Result<Vec<(String, Tensor)>> {
    let params = name(vars.trainable_variables(), vars)?;
    super::check_unique(&params)?;
    Ok(params)
}

/// The parameters and buffers of `vars`, by name: what [`crate::broadcast_parameters`] should equalise.
pub fn named_variables(vars: &nn::VarStore) -> Vec<(String, Tensor)> {
    let mut all: Vec<_> = vars.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Finds the names of `params`, leaving out those that are frozen.
fn name(params: Vec<Tensor>, vars: &nn::VarStore) -> Result<Vec<(String, Tensor)>> {
    let names: HashMap<_, _> = vars.variables().into_iter().map(|(name, var)| (var.data_ptr(), name)).collect();
    let named = |param: Tensor| match names.get(&param.data_ptr()) {
        Some(name) => Ok((name.clone(), param)),
        None => Err(Error::invalid("the optimizer was built for another VarStore")),
    };
    params.into_iter().filter(Tensor::requires_grad).map(named).collect()
}

fn no_state(what: &str) -> Error {
    Error::invalid(format!(
        "tch's optimizers keep their state to themselves: it cannot be {what}. Use hvd_torch::AdamW to resume a run \
         exactly, or start the optimizer anew on all ranks"
    ))
}

impl Optimizer for TchOptimizer {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        self.params.iter().map(|(name, param)| (name.clone(), param.shallow_clone())).collect()
    }

    fn step(&mut self) -> Result<()> {
        // tch's `step` would also take up variables that were added to the VarStore since; those are not reduced.
        let now = self.inner.trainable_variables().len();
        if now != self.variables {
            return Err(Error::invalid(format!(
                "the VarStore has grown from {} to {now} trainable variables since the optimizer was wrapped; \
                 create all variables first",
                self.variables
            )));
        }
        self.inner.step();
        Ok(())
    }

    /// Which optimizer this is, tch does not tell. SGD without weight decay can; the others panic in [`Optimizer::step`] with
    /// torch's words.
    fn takes_sparse(&self) -> bool {
        true
    }

    fn zero_grad(&mut self) -> Result<()> {
        self.inner.zero_grad();
        Ok(())
    }

    fn set_lr(&mut self, lr: f64) {
        self.inner.set_lr(lr);
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Err(no_state("saved"))
    }

    fn check_state(&self, _state: &[(String, Tensor)]) -> Result<()> {
        Err(no_state("loaded"))
    }

    fn load_state(&mut self, _state: &[(String, Tensor)]) -> Result<()> {
        Err(no_state("loaded"))
    }
}
