//! Messages from one rank to another.

use super::World;
use super::handles::VecHandle;
use super::process_set::owned;
use crate::dtype::Element;
use crate::engine::Stream;
use crate::engine::submission::{OpKind, Output, Submission};
use crate::error::{Error, Result};
use crate::memory::Memory;

impl World {
    /// Sends `data` to rank `peer`, which receives it with [`World::recv`] and the same tag; returns once it has begun to.
    ///
    /// Messages of one tag to one peer arrive in the order in which they are sent.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a peer that there is not; [`Error::Mismatch`] on both ranks where the peer expects other
    /// elements, else as [`crate::Handle::wait`].
    pub fn send<T: Element>(&self, peer: usize, tag: u32, data: &[T]) -> Result<()> {
        self.send_async(peer, tag, data.to_vec())?.wait().map(drop)
    }

    /// Receives what rank `peer` sends under `tag`, however long it is.
    ///
    /// # Errors
    /// As [`World::send`].
    pub fn recv<T: Element>(&self, peer: usize, tag: u32) -> Result<Vec<T>> {
        self.recv_async(peer, tag)?.wait()
    }

    /// Receives what rank `peer` sends under `tag`, which must be as long as `data`.
    ///
    /// # Errors
    /// As [`World::send`]; `data` is unchanged then.
    pub fn recv_into<T: Element>(&self, peer: usize, tag: u32, data: &mut [T]) -> Result<()> {
        data.copy_from_slice(&self.recv_exactly_async::<T>(peer, tag, data.len())?.wait()?);
        Ok(())
    }

    /// As [`World::send`], in the background. To be waited for before the world is shut down: a message that the peer has not
    /// begun to receive by then ends the world with an error.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a peer that there is not. What goes wrong later is the handle's to tell.
    pub fn send_async<T: Element>(&self, peer: usize, tag: u32, data: Vec<T>) -> Result<VecHandle<T>> {
        let message = owned(name("to", peer, tag), data, OpKind::Barrier);
        self.exchange(Stream { peer, sends: true, tag }, message).map(VecHandle::new)
    }

    /// As [`World::recv`], in the background.
    ///
    /// # Errors
    /// As [`World::send_async`].
    pub fn recv_async<T: Element>(&self, peer: usize, tag: u32) -> Result<VecHandle<T>> {
        let allocate = |bytes| Memory::from_vec(vec![T::default(); bytes / size_of::<T>()]);
        let receipt = Submission {
            output: Output::Allocate(Box::new(allocate)),
            ..owned::<T>(name("from", peer, tag), Vec::new(), OpKind::Barrier)
        };
        self.exchange(Stream { peer, sends: false, tag }, receipt).map(VecHandle::new)
    }

    /// As [`World::recv_async`], of a message that must have so many elements.
    ///
    /// # Errors
    /// As [`World::send_async`].
    pub fn recv_exactly_async<T: Element>(&self, peer: usize, tag: u32, elements: usize) -> Result<VecHandle<T>> {
        let receipt = owned(name("from", peer, tag), vec![T::default(); elements], OpKind::Barrier);
        self.exchange(Stream { peer, sends: false, tag }, receipt).map(VecHandle::new)
    }

    fn exchange(&self, stream: Stream, submission: Submission) -> Result<crate::Handle> {
        let (peer, rank, size) = (stream.peer, self.rank(), self.size());
        match &self.inner().engine {
            Some(engine) if peer < size && peer != rank => engine.exchange(stream, submission),
            _ => Err(Error::Invalid(format!("{}: rank {rank} of {size} has no such peer", submission.name))),
        }
    }
}

fn name(direction: &str, peer: usize, tag: u32) -> String {
    format!("message {direction} rank {peer} with tag {tag}")
}
