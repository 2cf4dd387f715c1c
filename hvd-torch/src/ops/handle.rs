//! Operations on tensors that are under way, and how a tensor becomes the runtime's memory.

use hvd_core::{Completion, Handle, OpKind, Output, ProcessSet, Submission};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::memory::{self, Allocator};

/// An operation on a tensor that is under way. Dropping it does not cancel the operation.
#[must_use = "the result is there only after `wait`"]
pub struct TensorHandle {
    handle: Handle,
    target: Target,
}

/// Operations on several tensors, negotiated as one, that are under way. Dropping it does not cancel them.
#[must_use = "the results are there only after `wait`"]
pub struct GroupHandle {
    handle: hvd_core::GroupHandle,
    targets: Vec<Target>,
}

/// Where a result is to go.
#[derive(Debug)]
pub(super) enum Target {
    /// Into a tensor that is there.
    Given {
        tensor: Tensor,
        /// What the runtime works on, where that is not the tensor itself.
        staged: Option<Tensor>,
    },
    /// Into a new tensor.
    Made {
        allocator: Allocator,
        /// Dimensions of a row.
        row: Vec<i64>,
        kind: Kind,
        device: Device,
    },
}

impl TensorHandle {
    /// Whether [`TensorHandle::wait`] would return at once.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for the operation; the tensor that holds the result.
    ///
    /// # Errors
    /// What the operation failed of; see [`hvd_core::Handle::wait`].
    pub fn wait(self) -> Result<Tensor> {
        self.wait_with_rows().map(|(tensor, _)| tensor)
    }

    /// As [`TensorHandle::wait`]; also how many rows came from each rank, for an allgather or an alltoall.
    pub fn wait_with_rows(self) -> Result<(Tensor, Vec<i64>)> {
        let done = self.handle.wait()?;
        let rows = rows(&done);
        Ok((self.target.fill(&rows)?, rows))
    }
}

impl GroupHandle {
    /// Whether [`GroupHandle::wait`] would return at once.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for all operations of the group; the tensors that hold the results, in order.
    ///
    /// # Errors
    /// As [`TensorHandle::wait`].
    pub fn wait(self) -> Result<Vec<Tensor>> {
        Ok(self.wait_with_rows()?.into_iter().map(|(tensor, _)| tensor).collect())
    }

    /// As [`GroupHandle::wait`]; also how many rows of each tensor came from each rank, for an allgather.
    pub fn wait_with_rows(self) -> Result<Vec<(Tensor, Vec<i64>)>> {
        let done = self.handle.wait()?;
        let filled = |(target, done): (Target, &Completion)| {
            let rows = rows(done);
            Ok((target.fill(&rows)?, rows))
        };
        self.targets.into_iter().zip(&done).map(filled).collect()
    }
}

fn rows(done: &Completion) -> Vec<i64> {
    done.first_dims.iter().map(|&rows| rows as i64).collect()
}

impl std::fmt::Debug for TensorHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorHandle({:?})", self.target)
    }
}

impl std::fmt::Debug for GroupHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GroupHandle({:?})", self.targets)
    }
}

impl Target {
    /// The tensor with the result. `rows` came from each rank; empty where that is nobody's question.
    fn fill(self, rows: &[i64]) -> Result<Tensor> {
        match self {
            Target::Given { mut tensor, staged: Some(staged) } => {
                tch::no_grad(|| tensor.f_copy_(&staged))?;
                Ok(tensor)
            }
            Target::Given { tensor, staged: None } => Ok(tensor),
            Target::Made { allocator, row, kind, device } => {
                let flat = allocator.take().map_or_else(|| Tensor::f_empty([0], (kind, Device::Cpu)), Ok)?;
                // Rows without elements have left no trace in the result.
                let elements: i64 = row.iter().product();
                let count = if elements == 0 { rows.iter().sum() } else { flat.numel() as i64 / elements };
                let size: Vec<_> = std::iter::once(count).chain(row).collect();
                Ok(flat.f_view(&*size)?.f_to_device(device)?)
            }
        }
    }
}

/// A submission that replaces the elements of `tensor`, and where they go.
pub(super) fn in_place(tensor: &Tensor, name: &str, kind: OpKind) -> Result<(Submission, Target)> {
    let staged = if memory::is_direct(tensor) { None } else { Some(stage(tensor)?) };
    let submission = submission(staged.as_ref().unwrap_or(tensor), name, kind, Output::InPlace)?;
    Ok((submission, Target::Given { tensor: tensor.detach(), staged }))
}

/// A submission whose result has the rows of `tensor` in a number that only the operation knows, and where they go.
pub(super) fn of_rows(tensor: &Tensor, name: &str, kind: OpKind) -> Result<(Submission, Target)> {
    let size = tensor.size();
    let Some((_, row)) = size.split_first() else {
        let text = format!("`{name}` is a scalar and has no rows: give it a dimension, `view([1])`");
        return Err(Error::invalid(text));
    };
    let staged = if memory::is_direct(tensor) { tensor.detach() } else { stage(tensor)? };
    let allocator = Allocator::new(tensor.kind());
    let output = Output::Allocate(Box::new({
        let allocator = allocator.clone();
        move |bytes| allocator.allocate(bytes)
    }));
    let submission = submission(&staged, name, kind, output)?;
    Ok((submission, Target::Made { allocator, row: row.to_vec(), kind: tensor.kind(), device: tensor.device() }))
}

fn submission(tensor: &Tensor, name: &str, kind: OpKind, output: Output) -> Result<Submission> {
    let dtype = memory::dtype(tensor.kind())?;
    let (shape, input) = (memory::shape(tensor), memory::of(tensor)?);
    Ok(Submission::new(name, kind, dtype, shape, input, output))
}

/// Hands in one operation.
pub(super) fn submit(set: &ProcessSet, (submission, target): (Submission, Target)) -> Result<TensorHandle> {
    Ok(TensorHandle { handle: set.submit(submission)?, target })
}

/// Hands in operations that are negotiated as one.
pub(super) fn submit_group(
    set: &ProcessSet,
    name: &str,
    operations: impl IntoIterator<Item = Result<(Submission, Target)>>,
) -> Result<GroupHandle> {
    let (submissions, targets) = operations.into_iter().collect::<Result<Vec<_>>>()?.into_iter().unzip();
    Ok(GroupHandle { handle: set.submit_group(name, submissions)?, targets })
}

/// A contiguous copy on the CPU.
pub(super) fn stage(tensor: &Tensor) -> Result<Tensor> {
    copy_to(tensor, Device::Cpu)
}

/// A contiguous copy on the same device, without history.
pub(crate) fn copy_of(tensor: &Tensor) -> Result<Tensor> {
    copy_to(tensor, tensor.device())
}

fn copy_to(tensor: &Tensor, device: Device) -> Result<Tensor> {
    tch::no_grad(|| {
        let mut copy = Tensor::f_empty(tensor.size(), (tensor.kind(), device))?;
        copy.f_copy_(tensor)?;
        Ok(copy)
    })
}
