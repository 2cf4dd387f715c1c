//! The part of a transport that some ranks of a world have to themselves.

use std::sync::Arc;

use super::{Request, Tag, Transport, Waiter};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// Who talks on which of a set's channels.
pub(crate) mod channel {
    /// Collectives.
    pub(crate) const OPERATIONS: u32 = 0;
    /// Messages from one rank to a higher one.
    pub(crate) const MESSAGES_UP: u32 = 1;
    /// And to a lower one.
    pub(crate) const MESSAGES_DOWN: u32 = 4;
    /// The forming of a group that shares memory.
    pub(crate) const FORMATION: u32 = 2;
    /// What is too long for the board of such a group.
    pub(crate) const BOARD: u32 = 3;
    /// Negotiation: one channel for each step of a round, up to the last of the set.
    pub(crate) const NEGOTIATION: u32 = 16;
    /// How many there are.
    pub(super) const COUNT: u32 = 64;
}

/// Sets that there can be in a world, itself included.
pub(crate) const MOST_SETS: u32 = 1 << 25;

/// A transport among some of a world's ranks, which are numbered anew, on channels of their own.
pub(crate) struct Subset<'a> {
    transport: &'a mut dyn Transport,
    /// The world's ranks, in the set's order.
    ranks: &'a [usize],
    /// This rank in the set.
    rank: usize,
    /// Where the set's channels begin.
    channels: u32,
}

impl<'a> Subset<'a> {
    /// The transport of set `number` among `ranks`, of which this one is `ranks[rank]`.
    pub(crate) fn new(transport: &'a mut dyn Transport, ranks: &'a [usize], rank: usize, number: u32) -> Self {
        Subset { transport, ranks, rank, channels: number * channel::COUNT }
    }

    fn tag(&self, tag: Tag) -> Tag {
        Tag { channel: self.channels + tag.channel, ..tag }
    }
}

impl Transport for Subset<'_> {
    fn name(&self) -> &'static str {
        self.transport.name()
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.ranks.len()
    }

    fn send(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request> {
        self.transport.send(self.ranks[peer], self.tag(tag), data)
    }

    fn recv(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request> {
        self.transport.recv(self.ranks[peer], self.tag(tag), into)
    }

    fn try_recv_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>> {
        self.transport.try_recv_any(self.ranks[peer], self.tag(tag))
    }

    fn test(&mut self, request: Request) -> Result<bool> {
        self.transport.test(request)
    }

    fn ring(&mut self, peer: usize) -> Result<()> {
        self.transport.ring(self.ranks[peer])
    }

    fn progress(&mut self) -> Result<bool> {
        self.transport.progress()
    }

    fn abort(&mut self, error: &Error) {
        self.transport.abort(error);
    }

    fn close(&mut self) -> Result<bool> {
        self.transport.close()
    }

    fn waiter(&self) -> Arc<dyn Waiter> {
        self.transport.waiter()
    }
}
