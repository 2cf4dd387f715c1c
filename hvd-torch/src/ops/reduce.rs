//! Reductions: allreduce and reducescatter, alone and grouped.

use hvd_core::{Allreduce, OpKind, ProcessSet, ReduceOp};
use tch::Tensor;

use super::gradient;
use super::handle::{GroupHandle, TensorHandle, copy_of, in_place, of_rows, submit, submit_group};
use crate::error::Result;

/// Starts a reduction of `tensor` over all ranks, in place. Leave the tensor alone until it is done.
pub fn allreduce_async_(
    set: &ProcessSet,
    tensor: &Tensor,
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<TensorHandle> {
    submit(set, in_place(tensor, name, OpKind::Allreduce(options.into()))?)
}

/// Reduces `tensor` over all ranks, in place. All ranks get the same bits.
pub fn allreduce_(set: &ProcessSet, tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Result<()> {
    allreduce_async_(set, tensor, name, options)?.wait().map(drop)
}

/// Starts a reduction of the ranks' tensors into a new tensor.
pub fn allreduce_async(
    set: &ProcessSet,
    tensor: &Tensor,
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<TensorHandle> {
    allreduce_async_(set, &copy_of(tensor)?, name, options)
}

/// The reduction of the ranks' tensors, as a new tensor. A gradient goes through a sum and an average.
pub fn allreduce(set: &ProcessSet, tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Result<Tensor> {
    let options = options.into();
    let reduce = || allreduce_async(set, tensor, name, options)?.wait();
    let lead = |result: &Tensor| gradient::of_allreduce(set, name, options, tensor, result);
    with_gradient([tensor], name, options, reduce, lead)
}

/// Starts reductions in place that are negotiated as one. Leave the tensors alone until they are done.
pub fn grouped_allreduce_async_(
    set: &ProcessSet,
    tensors: &[&Tensor],
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<GroupHandle> {
    let options = options.into();
    let member = |(at, tensor): (usize, &&Tensor)| in_place(tensor, &member(name, at), OpKind::Allreduce(options));
    submit_group(set, name, tensors.iter().enumerate().map(member))
}

/// Reduces tensors in place, negotiated as one.
pub fn grouped_allreduce_(
    set: &ProcessSet,
    tensors: &[&Tensor],
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<()> {
    grouped_allreduce_async_(set, tensors, name, options)?.wait().map(drop)
}

/// Starts reductions into new tensors that are negotiated as one.
pub fn grouped_allreduce_async(
    set: &ProcessSet,
    tensors: &[&Tensor],
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<GroupHandle> {
    let copies = tensors.iter().map(|tensor| copy_of(tensor)).collect::<Result<Vec<_>>>()?;
    grouped_allreduce_async_(set, &copies.iter().collect::<Vec<_>>(), name, options)
}

/// The reductions of the ranks' tensors, as new tensors, negotiated as one. A gradient goes through a sum and an average.
pub fn grouped_allreduce(
    set: &ProcessSet,
    tensors: &[&Tensor],
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<Vec<Tensor>> {
    let options = options.into();
    let reduce = || grouped_allreduce_async(set, tensors, name, options)?.wait();
    let lead = |results: &Vec<Tensor>| gradient::of_grouped_allreduce(set, name, options, tensors, results);
    with_gradient(tensors.iter().copied(), name, options, reduce, lead)
}

/// Starts a reduction of which each rank gets its share of the rows, as a new tensor.
pub fn reducescatter_async(
    set: &ProcessSet,
    tensor: &Tensor,
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<TensorHandle> {
    submit(set, of_rows(tensor, name, OpKind::Reducescatter(options.into()))?)
}

/// The reduction of the ranks' tensors, of which each rank gets its share of the rows: as even as can be, the first ranks
/// one more. A gradient goes through a sum and an average.
pub fn reducescatter(set: &ProcessSet, tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Result<Tensor> {
    let options = options.into();
    let reduce = || reducescatter_async(set, tensor, name, options)?.wait();
    let lead = |result: &Tensor| gradient::of_reducescatter(set, name, options, tensor, result);
    with_gradient([tensor], name, options, reduce, lead)
}

/// Starts reductions that are negotiated as one, of which each rank gets its share of the rows.
pub fn grouped_reducescatter_async(
    set: &ProcessSet,
    tensors: &[&Tensor],
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<GroupHandle> {
    let options = options.into();
    let member = |(at, tensor): (usize, &&Tensor)| of_rows(tensor, &member(name, at), OpKind::Reducescatter(options));
    submit_group(set, name, tensors.iter().enumerate().map(member))
}

/// As [`reducescatter`] for several tensors, negotiated as one.
pub fn grouped_reducescatter(
    set: &ProcessSet,
    tensors: &[&Tensor],
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<Vec<Tensor>> {
    let options = options.into();
    let reduce = || grouped_reducescatter_async(set, tensors, name, options)?.wait();
    let lead = |results: &Vec<Tensor>| gradient::of_grouped_reducescatter(set, name, options, tensors, results);
    with_gradient(tensors.iter().copied(), name, options, reduce, lead)
}

/// A reduction's result. Where one of the tensors wants a gradient, `lead` has it go through the result, if the operation lets it.
fn with_gradient<'a, R>(
    tensors: impl IntoIterator<Item = &'a Tensor>,
    name: &str,
    options: Allreduce,
    reduce: impl FnOnce() -> Result<R>,
    lead: impl FnOnce(&R) -> Result<()>,
) -> Result<R> {
    if !gradient::wanted(tensors) {
        return reduce();
    }
    gradient::check(name, options)?;
    let result = reduce()?;
    lead(&result)?;
    Ok(result)
}

/// The average of a number over all ranks, in f64.
pub fn metric_average(set: &ProcessSet, value: f64, name: &str) -> Result<f64> {
    let tensor = Tensor::from(value);
    allreduce_(set, &tensor, &format!("metric.{name}"), ReduceOp::Average)?;
    Ok(tensor.double_value(&[]))
}

/// The name of a tensor of a group.
pub(super) fn member(name: &str, at: usize) -> String {
    format!("{name}.{at}")
}
