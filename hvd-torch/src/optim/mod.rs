//! Optimizers: our fused [`AdamW`], and a small trait for others.

mod adamw;
mod native;
mod sharded;

pub use adamw::{AdamW, ParamGroup};
pub use native::{TchOptimizer, named_parameters, named_variables};
pub use sharded::ShardedAdamW;

use std::collections::HashSet;

use tch::Tensor;

use crate::error::{Error, Result};

/// What updates parameters from their gradients.
///
/// Tensors are shared, not copied: a shallow clone sees and makes the same changes.
pub trait Optimizer {
    /// The parameters in a fixed order, with unique names.
    fn parameters(&self) -> Vec<(String, Tensor)>;

    /// One update from the gradients. A parameter without a gradient stays as it is.
    fn step(&mut self) -> Result<()>;

    /// Whether it can update from sparse gradients; no, unless it says otherwise.
    fn takes_sparse(&self) -> bool {
        false
    }

    /// Zeroes the gradients.
    fn zero_grad(&mut self) -> Result<()>;

    /// Sets the learning rate of all parameter groups.
    fn set_lr(&mut self, lr: f64);

    /// What a resumed run needs besides the parameters, by name, in a fixed order.
    ///
    /// # Errors
    /// If this optimizer keeps its state to itself.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;

    /// Whether this optimizer can [load](Optimizer::load_state) `state`. Asks no other rank.
    ///
    /// # Errors
    /// If a tensor is missing, unknown or of another shape or type.
    fn check_state(&self, state: &[(String, Tensor)]) -> Result<()>;

    /// Copies `state` into this optimizer.
    ///
    /// # Errors
    /// Of [`Optimizer::check_state`]; then nothing was changed.
    fn load_state(&mut self, state: &[(String, Tensor)]) -> Result<()>;
}

impl<O: Optimizer + ?Sized> Optimizer for Box<O> {
    fn parameters(&self) -> Vec<(String, Tensor)> {
        (**self).parameters()
    }

    fn step(&mut self) -> Result<()> {
        (**self).step()
    }

    fn takes_sparse(&self) -> bool {
        (**self).takes_sparse()
    }

    fn zero_grad(&mut self) -> Result<()> {
        (**self).zero_grad()
    }

    fn set_lr(&mut self, lr: f64) {
        (**self).set_lr(lr);
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        (**self).state()
    }

    fn check_state(&self, state: &[(String, Tensor)]) -> Result<()> {
        (**self).check_state(state)
    }

    fn load_state(&mut self, state: &[(String, Tensor)]) -> Result<()> {
        (**self).load_state(state)
    }
}

/// Refuses names that occur twice.
pub(crate) fn check_unique(params: &[(String, Tensor)]) -> Result<()> {
    let mut seen = HashSet::new();
    match params.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        Some((name, _)) => Err(Error::invalid(format!("two parameters are named `{name}`; names must be unique"))),
        None => Ok(()),
    }
}
