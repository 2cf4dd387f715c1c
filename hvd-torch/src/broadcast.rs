//! All ranks start from the same state.

use hvd_core::ProcessSet;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::ops;
use crate::optim::{Optimizer, check_unique};

/// Overwrites the tensors of all ranks with those of rank `root`.
///
/// Takes parameters and buffers of any kind (bool and integers too), contiguous or not. All are under way together.
///
/// # Errors
/// If names occur twice, or the ranks' lists differ.
pub fn broadcast_parameters(set: &ProcessSet, params: &[(String, Tensor)], root: usize) -> Result<()> {
    broadcast_all(set, "parameter", params, root)
}

/// Overwrites the optimizer's state on all ranks with that of rank `root`.
///
/// # Errors
/// If the optimizer keeps its state to itself ([`crate::TchOptimizer`]).
pub fn broadcast_optimizer_state<O: Optimizer>(set: &ProcessSet, optimizer: &mut O, root: usize) -> Result<()> {
    broadcast_all(set, "optimizer", &optimizer.state()?, root)
}

fn broadcast_all(set: &ProcessSet, prefix: &str, tensors: &[(String, Tensor)], root: usize) -> Result<()> {
    check_unique(tensors)?;
    if !set.ranks().contains(&root) {
        return Err(Error::invalid(format!(
            "there is no rank {root} to broadcast from among the {} rank(s)",
            set.size()
        )));
    }
    if set.size() == 1 {
        return Ok(());
    }
    let start =
        |(name, tensor): &(String, Tensor)| ops::broadcast_async_(set, tensor, &format!("{prefix}.{name}"), root);
    let under_way = tensors.iter().map(start).collect::<Result<Vec<_>>>()?;
    // Wait for all, also after an error, so that nothing still writes to the tensors when this returns.
    under_way.into_iter().map(|handle| handle.wait().map(drop)).fold(Ok(()), Result::and)
}
