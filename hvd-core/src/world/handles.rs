//! Operations on owned vectors under way.

use std::marker::PhantomData;

use super::process_set::ProcessSet;
use crate::dtype::Element;
use crate::engine::submission::Completion;
use crate::engine::{GroupHandle, Handle};
use crate::error::Result;

/// An operation on an owned vector under way. Dropping it does not cancel the operation.
pub struct VecHandle<T> {
    handle: Handle,
    elements: PhantomData<T>,
}

impl<T: Element> VecHandle<T> {
    /// `handle` must be that of an operation whose output is elements of type `T`.
    pub(super) fn new(handle: Handle) -> Self {
        VecHandle { handle, elements: PhantomData }
    }

    /// Whether the operation is done. Never blocks.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for the operation and gives the result.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn wait(self) -> Result<Vec<T>> {
        self.wait_with_rows().map(|(result, _)| result)
    }

    /// As [`VecHandle::wait`], and how many elements of the result come from each rank, by rank: of an allgather or an
    /// alltoall, else empty.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn wait_with_rows(self) -> Result<(Vec<T>, Vec<usize>)> {
        self.handle.wait().map(into_vec)
    }
}

/// The operations of a group of owned vectors under way. Dropping it does not cancel them.
pub struct GroupVecHandle<T> {
    handle: GroupHandle,
    elements: PhantomData<T>,
}

impl<T: Element> GroupVecHandle<T> {
    /// `handle` must be that of operations whose outputs are elements of type `T`.
    pub(super) fn new(handle: GroupHandle) -> Self {
        GroupVecHandle { handle, elements: PhantomData }
    }

    /// Whether all of them are done. Never blocks.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for all of them and gives the results, in the order in which the tensors were given.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn wait(self) -> Result<Vec<Vec<T>>> {
        let completions = self.handle.wait()?;
        Ok(completions.into_iter().map(|completion| into_vec(completion).0).collect())
    }
}

/// A join under way. Dropping it does not take it back, but see [`JoinHandle::wait`].
#[must_use = "the set can be used again only after `wait`"]
pub struct JoinHandle {
    handle: Handle,
    set: ProcessSet,
}

impl JoinHandle {
    pub(super) fn new(handle: Handle, set: ProcessSet) -> Self {
        JoinHandle { handle, set }
    }

    /// Whether all ranks have joined. Never blocks.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits until all ranks have joined and gives the last one, as the world numbers it. To be called before the set's next
    /// operation: it brings the names of barriers, of which the ranks may have seen different numbers, back in step.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn wait(self) -> Result<usize> {
        let last = self.handle.wait()?.number;
        self.set.renumber();
        Ok(last)
    }
}

fn into_vec<T: Element>(completion: Completion) -> (Vec<T>, Vec<usize>) {
    let Completion { output, first_dims, .. } = completion;
    // SAFETY: the operation is done.
    (unsafe { output.into_vec() }, first_dims)
}
