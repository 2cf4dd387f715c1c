//! Memory that the runtime hands out and reduces in place.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering;

use super::World;
use crate::dtype::Element;
use crate::engine::Handle;
use crate::engine::submission::{Allreduce, OpKind, Output, Submission};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::shm::ShmRegion;

/// Elements of this rank that the other ranks of the host reach, so that an allreduce copies nothing.
///
/// It is used as a slice: an allreduce recognises that the slice it is given lies in a shared buffer, and likewise
/// parts of it. Made by [`World::shared_buffer`]. An allreduce is in place where all ranks give the same part of the same
/// buffer, uncompressed and without a prescale factor; otherwise, and for all other operations, it is memory like any other.
/// Once the world has failed, a peer may still be writing to it.
pub struct SharedBuffer<T> {
    memory: Memory,
    elements: PhantomData<Vec<T>>,
}

impl World {
    /// Zeroed memory for `len` elements that is reduced in place where all ranks are on one host, and ordinary memory where
    /// they are not or the host does not have so much. To be called by all ranks, with the same `len` and element size, in
    /// the same order.
    ///
    /// ```
    /// use hvd_core::{ReduceOp, World};
    ///
    /// let world = World::from_env()?;
    /// let mut gradients = world.shared_buffer::<f32>(1 << 20)?;
    /// gradients.fill(1.0);
    /// world.allreduce("gradients", &mut gradients, ReduceOp::Sum)?;
    /// assert_eq!(gradients[0], world.size() as f32);
    /// # world.shutdown()?;
    /// # Ok::<(), hvd_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] where the lengths differ, else as [`Handle::wait`].
    pub fn shared_buffer<T: Element>(&self, len: usize) -> Result<SharedBuffer<T>> {
        let bytes = len.checked_mul(size_of::<T>());
        let bytes = bytes.ok_or_else(|| Error::Invalid(format!("a shared buffer of {len} elements is too large")))?;
        let memory = self.shared_memory(bytes)?.unwrap_or_else(|| Memory::zeroed(bytes));
        Ok(SharedBuffer { memory, elements: PhantomData })
    }

    /// As [`World::shared_buffer`], for those who hand memory to
    /// [`ProcessSet::submit`](super::ProcessSet::submit) themselves.
    ///
    /// `None` on all ranks where there is no such memory. It is aligned to a page.
    ///
    /// # Errors
    /// As [`World::shared_buffer`].
    pub fn shared_memory(&self, bytes: usize) -> Result<Option<Memory>> {
        let world = self.0.world();
        let Some(group) = &world.shared else { return Ok(None) };
        let region = ShmRegion::new(group.clone(), bytes)
            .inspect_err(|error| tracing::warn!(%error, "gradients and the like are copied instead"));
        let number = world.shared_buffers.fetch_add(1, Ordering::Relaxed);
        let own = (bytes as u64, region.as_ref().ok().map(|region| region.start() as u64));
        let all = self.allgather_object(&format!("hvd.shared_buffer.{number}"), &own)?;
        if let Some(rank) = all.iter().position(|(theirs, _)| *theirs != own.0) {
            let theirs = all[rank].0;
            return Err(Error::Invalid(format!("a shared buffer has {bytes} bytes here and {theirs} on rank {rank}")));
        }
        let starts = all.into_iter().map(|(_, start)| start.and_then(|start| usize::try_from(start).ok()));
        match (region, starts.collect()) {
            (Ok(region), Some(starts)) => region.bind(number, starts).map(Some),
            _ => Ok(None),
        }
    }

    /// As [`ProcessSet::allreduce`](super::ProcessSet::allreduce) of a whole buffer, in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit`](super::ProcessSet::submit).
    pub fn allreduce_shared_async<T: Element>(
        &self,
        name: &str,
        buffer: SharedBuffer<T>,
        options: impl Into<Allreduce>,
    ) -> Result<SharedHandle<T>> {
        let (kind, shape) = (OpKind::Allreduce(options.into()), vec![buffer.len()]);
        let submission = Submission::new(name, kind, T::DTYPE, shape, buffer.memory, Output::InPlace);
        Ok(SharedHandle { handle: self.submit(submission)?, elements: PhantomData })
    }
}

impl<T: Element> Deref for SharedBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the memory is aligned to 8 bytes and holds elements from the start; no operation uses it, as it would have
        // taken or borrowed the buffer.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() / size_of::<T>()) }
    }
}

impl<T: Element> DerefMut for SharedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; nobody else has a reference, as the memory is cloned for operations only.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr().cast(), self.memory.len() / size_of::<T>()) }
    }
}

impl<T> std::fmt::Debug for SharedBuffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedBuffer({} bytes)", self.memory.len())
    }
}

/// An operation on a [`SharedBuffer`] under way. Dropping it does not cancel the operation.
pub struct SharedHandle<T> {
    handle: Handle,
    elements: PhantomData<T>,
}

impl<T: Element> SharedHandle<T> {
    /// Whether the operation is done. Never blocks.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for the operation and gives the buffer back.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn wait(self) -> Result<SharedBuffer<T>> {
        let memory = self.handle.wait()?.output;
        Ok(SharedBuffer { memory, elements: PhantomData })
    }
}
