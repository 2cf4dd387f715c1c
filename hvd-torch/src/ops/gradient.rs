//! Gradients of collective operations: of the sum of all ranks' losses.

use hvd_core::{Allreduce, ProcessSet, ReduceOp};
use tch::Tensor;

use super::{allgather, allreduce, alltoall, grouped_allgather, grouped_allreduce};
use crate::autograd::differentiate;
pub(super) use crate::autograd::wanted;
use crate::error::{Error, Result};

/// Refuses a reduction through which no gradient goes.
pub(super) fn check(name: &str, options: Allreduce) -> Result<()> {
    match options.op {
        ReduceOp::Sum | ReduceOp::Average => Ok(()),
        op => Err(Error::invalid(format!(
            "`{name}`: {op:?} over ranks has no gradient; detach() the tensor, or use Sum or Average"
        ))),
    }
}

/// Each rank's elements reach every rank's result: so do the gradients, in the same way.
pub(super) fn of_allreduce(
    set: &ProcessSet,
    name: &str,
    options: Allreduce,
    input: &Tensor,
    output: &Tensor,
) -> Result<()> {
    let (set, name) = (set.clone(), name_of(name));
    attach(input, output, move |grad| allreduce(&set, grad, &name, options))
}

/// As [`of_allreduce`].
pub(super) fn of_grouped_allreduce(
    set: &ProcessSet,
    name: &str,
    options: Allreduce,
    inputs: &[&Tensor],
    outputs: &[Tensor],
) -> Result<()> {
    let (set, name) = (set.clone(), name_of(name));
    let backward = move |grads: &[Tensor]| grouped_allreduce(&set, &references(grads), &name, options);
    differentiate(inputs, outputs, Box::new(backward))
}

/// Every rank's elements went into the shares of all.
pub(super) fn of_reducescatter(
    set: &ProcessSet,
    name: &str,
    options: Allreduce,
    input: &Tensor,
    output: &Tensor,
) -> Result<()> {
    let (factor, set, name) = (factor(set, options), set.clone(), name_of(name));
    attach(input, output, move |grad| scaled(allgather(&set, grad, &name)?, factor))
}

/// As [`of_reducescatter`].
pub(super) fn of_grouped_reducescatter(
    set: &ProcessSet,
    name: &str,
    options: Allreduce,
    inputs: &[&Tensor],
    outputs: &[Tensor],
) -> Result<()> {
    let (factor, set, name) = (factor(set, options), set.clone(), name_of(name));
    let backward = move |grads: &[Tensor]| {
        let whole = grouped_allgather(&set, &references(grads), &name)?;
        whole.into_iter().map(|grad| scaled(grad, factor)).collect()
    };
    differentiate(inputs, outputs, Box::new(backward))
}

/// Everybody's result came from the root.
pub(super) fn of_broadcast(set: &ProcessSet, name: &str, root: usize, input: &Tensor, output: &Tensor) -> Result<()> {
    let (set, name) = (set.clone(), name_of(name));
    attach(input, output, move |grad| {
        let sum = allreduce(&set, grad, &name, ReduceOp::Sum)?;
        Ok(if set.rank() == root { sum } else { sum.f_zeros_like()? })
    })
}

/// This rank's rows lie in everybody's result behind those of the ranks before it. `rows`: of each tensor, each rank's.
pub(super) fn of_allgather(
    set: &ProcessSet,
    name: &str,
    rows: &[&[i64]],
    inputs: &[&Tensor],
    outputs: &[Tensor],
) -> Result<()> {
    let own = set.ranks().iter().take_while(|&&rank| rank < set.rank()).count();
    let share = |rows: &&[i64]| (rows[..own].iter().sum::<i64>(), rows[own]);
    let shares: Vec<_> = rows.iter().map(share).collect();
    let (set, name) = (set.clone(), name_of(name));
    let backward = move |grads: &[Tensor]| {
        let sums = grouped_allreduce(&set, &references(grads), &name, ReduceOp::Sum)?;
        let own = |(sum, &(start, length)): (&Tensor, &(i64, i64))| Ok(sum.f_narrow(0, start, length)?);
        sums.iter().zip(&shares).map(own).collect()
    };
    differentiate(inputs, outputs, Box::new(backward))
}

/// The way back: what came from a rank goes to it.
pub(super) fn of_alltoall(
    set: &ProcessSet,
    name: &str,
    received: &[i64],
    input: &Tensor,
    output: &Tensor,
) -> Result<()> {
    let (set, name, splits) = (set.clone(), name_of(name), received.to_vec());
    attach(input, output, move |grad| Ok(alltoall(&set, grad, &name, Some(&splits))?.0))
}

/// Gives the one result of one tensor a gradient.
fn attach(
    input: &Tensor,
    output: &Tensor,
    backward: impl Fn(&Tensor) -> Result<Tensor> + Send + 'static,
) -> Result<()> {
    differentiate(&[input], std::slice::from_ref(output), move |grads| Ok(vec![backward(&grads[0])?]))
}

/// The name of an operation's backward pass.
fn name_of(name: &str) -> String {
    format!("{name}.grad")
}

fn references(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

/// What each rank's elements are multiplied by on their way into the result.
fn factor(set: &ProcessSet, options: Allreduce) -> f64 {
    let mean = if options.op == ReduceOp::Average { set.size() as f64 } else { 1.0 };
    options.prescale * options.postscale / mean
}

fn scaled(tensor: Tensor, factor: f64) -> Result<Tensor> {
    Ok(if factor == 1.0 { tensor } else { tensor.f_mul_scalar(factor)? })
}
