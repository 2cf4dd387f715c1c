//! Operations on slices and vectors of elements.

use std::ptr::NonNull;

use super::handles::{JoinHandle, VecHandle};
use super::process_set::{ProcessSet, empty, owned};
use crate::dtype::Element;
use crate::engine::Handle;
use crate::engine::submission::{Allreduce, OpKind, Output, Submission};
use crate::error::Result;
use crate::memory::Memory;

impl ProcessSet {
    /// Combines every rank's `data`, which all get back.
    ///
    /// # Errors
    /// As [`Handle::wait`]; `data` is unspecified then.
    pub fn allreduce<T: Element>(&self, name: &str, data: &mut [T], options: impl Into<Allreduce>) -> Result<()> {
        self.run_borrowed(name, data, OpKind::Allreduce(options.into()))
    }

    /// Combines every rank's `input` into every rank's `output`, of the same length.
    ///
    /// # Errors
    /// As [`Handle::wait`]; `output` is unspecified then.
    pub fn allreduce_into<T: Element>(
        &self,
        name: &str,
        input: &[T],
        output: &mut [T],
        options: impl Into<Allreduce>,
    ) -> Result<()> {
        let kind = OpKind::Allreduce(options.into());
        let (bytes, shape) = (size_of_val(output), vec![input.len()]);
        let into = match self.may_borrow() {
            // SAFETY: `output` stays borrowed until `wait` returns, and the engine drops its memory before it completes.
            true => unsafe { Memory::from_raw_parts(NonNull::from(&mut *output).cast(), bytes, None) },
            false => Memory::from_vec(output.to_vec()),
        };
        let submission =
            Submission::new(name, kind, T::DTYPE, shape, Memory::from_vec(input.to_vec()), Output::Into(into));
        let result = self.hand_in(submission, false)?.wait()?.output;
        if !self.may_borrow() {
            // SAFETY: the operation is done.
            output.copy_from_slice(&unsafe { result.into_vec::<T>() });
        }
        Ok(())
    }

    /// Gives all ranks the root's `data`, which must have the same length on all. `root` is a rank of the world.
    ///
    /// # Errors
    /// As [`Handle::wait`]; `data` is unspecified then.
    pub fn broadcast<T: Element>(&self, name: &str, data: &mut [T], root: usize) -> Result<()> {
        self.run_borrowed(name, data, OpKind::Broadcast { root })
    }

    /// Gives all ranks everyone's `data`, by rank. Lengths may differ.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn allgather<T: Element>(&self, name: &str, data: &[T]) -> Result<Vec<T>> {
        self.allgather_async(name, data.to_vec())?.wait()
    }

    /// Gives each rank its block of everyone's `data`: the blocks, by rank, and their lengths.
    ///
    /// `splits` are the lengths of the blocks in `data` for each rank of the set; together they are all of it. Without, all
    /// get equally much. What the other ranks do with theirs does not matter.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn alltoall<T: Element>(
        &self,
        name: &str,
        data: &[T],
        splits: Option<&[usize]>,
    ) -> Result<(Vec<T>, Vec<usize>)> {
        self.alltoall_async(name, data.to_vec(), splits)?.wait_with_rows()
    }

    /// Combines every rank's `data` and gives each rank its share of the result: as even as can be, the first ranks one
    /// element more.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn reducescatter<T: Element>(&self, name: &str, data: &[T], options: impl Into<Allreduce>) -> Result<Vec<T>> {
        self.reducescatter_async(name, data.to_vec(), options)?.wait()
    }

    /// Returns on no rank before it has been called on every rank.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn barrier(&self) -> Result<()> {
        self.hand_in(empty(self.unnamed("barrier"), OpKind::Barrier), false)?.wait().map(drop)
    }

    /// Says that this rank has no more data, and waits until all ranks of the set have said so; gives the last one that did,
    /// as the world numbers it. The way to end an epoch in which some ranks have more steps than others.
    ///
    /// It takes effect once this rank's earlier operations are agreed on. Until all have joined, this rank takes part in
    /// what the others submit without contributing: a reduction combines what the others have (so an average is over them
    /// alone), gathering ranks get no rows of it, and what it would get is thrown away. Whose broadcast it would be, gets
    /// [`crate::Error::Invalid`] instead.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn join(&self) -> Result<usize> {
        self.join_async()?.wait()
    }

    /// As [`ProcessSet::join`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`].
    pub fn join_async(&self) -> Result<JoinHandle> {
        let handle = self.submit(empty("join".into(), OpKind::Join))?;
        Ok(JoinHandle::new(handle, self.clone()))
    }

    /// As [`ProcessSet::allreduce`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`].
    pub fn allreduce_async<T: Element>(
        &self,
        name: &str,
        data: Vec<T>,
        options: impl Into<Allreduce>,
    ) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Allreduce(options.into()))
    }

    /// As [`ProcessSet::broadcast`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`].
    pub fn broadcast_async<T: Element>(&self, name: &str, data: Vec<T>, root: usize) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Broadcast { root })
    }

    /// As [`ProcessSet::allgather`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`].
    pub fn allgather_async<T: Element>(&self, name: &str, data: Vec<T>) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Allgather)
    }

    /// As [`ProcessSet::alltoall`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`].
    pub fn alltoall_async<T: Element>(
        &self,
        name: &str,
        data: Vec<T>,
        splits: Option<&[usize]>,
    ) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Alltoall { splits: splits.map(<[usize]>::to_vec) })
    }

    /// As [`ProcessSet::reducescatter`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`].
    pub fn reducescatter_async<T: Element>(
        &self,
        name: &str,
        data: Vec<T>,
        options: impl Into<Allreduce>,
    ) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Reducescatter(options.into()))
    }

    /// As [`ProcessSet::barrier`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`].
    pub fn barrier_async(&self) -> Result<Handle> {
        self.submit(empty(self.unnamed("barrier"), OpKind::Barrier))
    }

    fn run_owned<T: Element>(&self, name: &str, data: Vec<T>, kind: OpKind) -> Result<VecHandle<T>> {
        self.submit(owned(name.into(), data, kind)).map(VecHandle::new)
    }
}
