//! Collective operations on tensors, in a world that the caller names.
//!
//! The functions of the same names in the crate's root use the global world. All ranks must call an operation with the
//! same name, kind and (except for the first dimension of [`allgather`]) shape. Tensors may be of any of the runtime's
//! kinds, on any device, contiguous or not; those that are not contiguous or not on the CPU go through a copy.

pub use crate::broadcast::{broadcast_optimizer_state, broadcast_parameters};

use hvd_core::{Allreduce, Handle, OpKind, Output, ReduceOp, Submission, World};
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::memory::{self, Allocator};

/// An operation on a tensor that is under way. Dropping it does not cancel the operation.
#[must_use = "the result is there only after `wait`"]
pub struct TensorHandle {
    handle: Handle,
    /// The tensor that the result goes to.
    target: Tensor,
    /// What the runtime works on, where that is not `target` itself.
    staged: Option<Tensor>,
}

impl TensorHandle {
    /// Whether [`TensorHandle::wait`] would return at once.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for the operation; the tensor that holds the result.
    pub fn wait(mut self) -> Result<Tensor> {
        self.handle.wait()?;
        if let Some(staged) = self.staged {
            tch::no_grad(|| self.target.f_copy_(&staged))?;
        }
        Ok(self.target)
    }
}

impl std::fmt::Debug for TensorHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorHandle({:?})", self.target)
    }
}

/// A contiguous copy on the CPU.
fn stage(tensor: &Tensor) -> Result<Tensor> {
    tch::no_grad(|| {
        let copy = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
        copy.shallow_clone().f_copy_(tensor)?;
        Ok(copy)
    })
}

/// Starts an operation that replaces the elements of `tensor`.
pub(crate) fn submit_in_place(world: &World, tensor: &Tensor, name: &str, kind: OpKind) -> Result<TensorHandle> {
    let dtype = memory::dtype(tensor.kind())?;
    let staged = if memory::is_direct(tensor) { None } else { Some(stage(tensor)?) };
    let input = memory::of(staged.as_ref().unwrap_or(tensor))?;
    let shape = memory::shape(tensor);
    let handle = world.submit(Submission::new(name, kind, dtype, shape, input, Output::InPlace))?;
    Ok(TensorHandle { handle, target: tensor.detach(), staged })
}

/// Starts a reduction of `tensor` over all ranks, in place. Leave the tensor alone until it is done.
pub fn allreduce_async_(
    world: &World,
    tensor: &Tensor,
    name: &str,
    options: impl Into<Allreduce>,
) -> Result<TensorHandle> {
    submit_in_place(world, tensor, name, OpKind::Allreduce(options.into()))
}

/// Reduces `tensor` over all ranks, in place. All ranks get the same bits.
pub fn allreduce_(world: &World, tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Result<()> {
    allreduce_async_(world, tensor, name, options)?.wait().map(drop)
}

/// The reduction of the ranks' tensors, as a new tensor. Has no gradient.
pub fn allreduce(world: &World, tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Result<Tensor> {
    let result = copy_of(tensor)?;
    allreduce_(world, &result, name, options)?;
    Ok(result)
}

/// Starts a broadcast that overwrites `tensor` with that of rank `root`. Leave the tensor alone until it is done.
pub fn broadcast_async_(world: &World, tensor: &Tensor, name: &str, root: usize) -> Result<TensorHandle> {
    submit_in_place(world, tensor, name, OpKind::Broadcast { root })
}

/// Overwrites `tensor` with that of rank `root`.
pub fn broadcast_(world: &World, tensor: &Tensor, name: &str, root: usize) -> Result<()> {
    broadcast_async_(world, tensor, name, root)?.wait().map(drop)
}

/// The tensor of rank `root`, as a new tensor. Kind and shape must be the same on all ranks.
pub fn broadcast(world: &World, tensor: &Tensor, name: &str, root: usize) -> Result<Tensor> {
    let result = copy_of(tensor)?;
    broadcast_(world, &result, name, root)?;
    Ok(result)
}

/// The ranks' tensors one after the other along the first dimension, in which they may differ.
pub fn allgather(world: &World, tensor: &Tensor, name: &str) -> Result<Tensor> {
    let mut size = tensor.size();
    if size.is_empty() {
        return Err(Error::invalid(format!("allgather of the scalar `{name}`: give it a dimension, `view([1])`")));
    }
    let dtype = memory::dtype(tensor.kind())?;
    let staged = if memory::is_direct(tensor) { tensor.detach() } else { stage(tensor)? };
    let allocator = Allocator::new(tensor.kind());
    let output = Output::Allocate(Box::new({
        let allocator = allocator.clone();
        move |bytes| allocator.allocate(bytes)
    }));
    let (shape, input) = (memory::shape(tensor), memory::of(&staged)?);
    let submission = Submission::new(name, OpKind::Allgather, dtype, shape, input, output);
    let done = world.submit(submission)?.wait()?;
    size[0] = done.first_dims.iter().sum::<usize>() as i64;
    let flat = match allocator.take() {
        Some(flat) => flat,
        None => Tensor::f_empty([0], (tensor.kind(), Device::Cpu))?,
    };
    Ok(flat.f_view(size.as_slice())?.f_to_device(tensor.device())?)
}

/// The average of a number over all ranks, in f64.
pub fn metric_average(world: &World, value: f64, name: &str) -> Result<f64> {
    let tensor = Tensor::from(value);
    allreduce_(world, &tensor, &format!("metric.{name}"), ReduceOp::Average)?;
    Ok(tensor.double_value(&[]))
}

/// A contiguous copy on the same device, without history.
fn copy_of(tensor: &Tensor) -> Result<Tensor> {
    tch::no_grad(|| {
        let mut copy = Tensor::f_empty(tensor.size(), (tensor.kind(), tensor.device()))?;
        copy.f_copy_(tensor)?;
        Ok(copy)
    })
}
