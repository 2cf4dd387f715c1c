//! Adaptive summation of updates (Maleki et al. 2020, "Scaling distributed training with adaptive summation").

use hvd_core::{ProcessSet, ReduceOp};
use tch::Tensor;

use crate::error::Result;
use crate::ops;
use crate::optim::Optimizer;

/// Lets this rank update by its own gradients, and has all ranks take what the updates changed, combined for each parameter.
pub(super) fn step<O: Optimizer>(optimizer: &mut O, set: &ProcessSet, name: &str) -> Result<()> {
    let params = optimizer.parameters();
    let before = params.iter().map(|(_, param)| ops::copy_of(param)).collect::<Result<Vec<_>>>()?;
    optimizer.step()?;
    let change = |((_, param), before): (&(String, Tensor), &Tensor)| Ok(tch::no_grad(|| param.f_sub(before))?);
    let changes = params.iter().zip(&before).map(change).collect::<Result<Vec<_>>>()?;
    ops::grouped_allreduce_(set, &changes.iter().collect::<Vec<_>>(), &format!("{name}.updates"), ReduceOp::Adasum)?;
    tch::no_grad(|| {
        for (((_, param), before), change) in params.iter().zip(&before).zip(&changes) {
            param.shallow_clone().f_copy_(&before.f_add(change)?)?;
        }
        Ok(())
    })
}
