//! What all ring algorithms do: hand segments round the ring.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Feed, retire};
use crate::error::Result;
use crate::memory::Memory;
use crate::reduce::{self, Reduction};
use crate::transport::{Request, Tag, Transport};

/// Receives, and sends, that are in flight at a time; each staged receive needs a segment of scratch memory.
const WINDOW: usize = 8;

/// Which segments of the buffer pass through this rank, in order. It starts with the first `own` of them, gets every
/// further one from its predecessor, and sends each but those from `kept` on to its successor.
pub(super) struct Path {
    /// Byte ranges of the buffer.
    pub segments: Vec<Range<usize>>,
    /// So many need not be received.
    pub own: usize,
    /// Received segments before this one are partial results: they are combined with what the buffer holds. Those from
    /// here on are results: they replace it.
    pub reduced: usize,
    /// From this segment up to `reduced`, a partial result becomes a result here: it is finished.
    pub finished: usize,
    /// Segments from here on are not sent.
    pub kept: usize,
}

/// A walk along a [`Path`]. All cursors are indices of its segments.
pub(super) struct Relay {
    path: Path,
    buffer: Memory,
    /// Needed where something is reduced.
    reduction: Option<Reduction>,
    /// Fills the buffer and takes its results; `None` where it is full from the start and they stay there.
    pub(super) feed: Option<Box<dyn Feed>>,
    /// How many ranks' elements the results combine.
    pub ranks: usize,
    next: usize,
    previous: usize,
    tag: Tag,
    /// Where partial results arrive: [`WINDOW`] slots.
    staging: Memory,
    slot_bytes: usize,
    started: bool,
    /// Segments before this one have been filled by the feed.
    filled: usize,
    /// Segments from the first result to before this one have been taken by the feed.
    drained: usize,
    /// Receives before this segment are posted.
    posted: usize,
    /// Segments before this one are in the buffer as they will be sent.
    taken: usize,
    /// Sends before this segment are posted.
    sent: usize,
    /// Sends before this segment are complete.
    retired: usize,
    receives: VecDeque<Request>,
    sends: VecDeque<Request>,
}

impl Relay {
    pub(super) fn new(
        rank: usize,
        size: usize,
        buffer: Memory,
        path: Path,
        reduction: Option<Reduction>,
        tag: Tag,
    ) -> Self {
        let staged = path.reduced.saturating_sub(path.own).min(WINDOW);
        let slot_bytes = path.segments.iter().map(|segment| segment.len()).max().unwrap_or(0);
        Relay {
            buffer,
            reduction,
            feed: None,
            ranks: size,
            next: (rank + 1) % size,
            previous: (rank + size - 1) % size,
            tag,
            staging: Memory::zeroed(staged * slot_bytes),
            slot_bytes,
            started: false,
            filled: 0,
            drained: path.finished,
            posted: path.own,
            taken: path.own,
            sent: 0,
            retired: 0,
            receives: VecDeque::new(),
            sends: VecDeque::new(),
            path,
        }
    }

    pub(super) fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        if !self.started {
            self.started = true;
            for index in self.path.finished..self.path.own {
                self.fill(index);
                self.finish(index);
            }
        }
        loop {
            let mut moved = self.post_receives(transport)?;
            moved |= self.take(transport)?;
            moved |= self.post_sends(transport)?;
            self.drain();
            moved |= self.retire(transport)?;
            if self.taken == self.path.segments.len() && self.retired == self.path.kept {
                return Ok(true);
            }
            if !moved {
                return Ok(false);
            }
        }
    }

    fn post_receives(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let before = self.posted;
        while self.posted < self.path.segments.len() && self.receives.len() < WINDOW && self.may_receive(self.posted) {
            let into = self.landing(self.posted);
            self.receives.push_back(transport.recv(self.previous, self.tag, into)?);
            self.posted += 1;
        }
        Ok(self.posted > before)
    }

    /// Where a result replaces a partial result, that one must have left first. The results come in the order in which
    /// the partial ones went, so the counts suffice; and partial results never wait for sends, so this wait ends.
    fn may_receive(&self, index: usize) -> bool {
        self.is_partial(index) || self.path.reduced <= self.path.own || self.retired > index - self.path.reduced
    }

    fn is_partial(&self, index: usize) -> bool {
        index < self.path.reduced
    }

    fn landing(&self, index: usize) -> Memory {
        let segment = self.path.segments[index].clone();
        if self.is_partial(index) {
            let start = (index - self.path.own) % WINDOW * self.slot_bytes;
            self.staging.slice(start..start + segment.len())
        } else {
            self.buffer.slice(segment)
        }
    }

    /// Takes in the oldest receive if it has arrived.
    fn take(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let Some(&oldest) = self.receives.front() else { return Ok(false) };
        if !transport.test(oldest)? {
            return Ok(false);
        }
        self.receives.pop_front();
        if self.is_partial(self.taken) {
            self.accumulate(self.taken);
        }
        self.taken += 1;
        Ok(true)
    }

    /// Has the feed fill everything up to this segment.
    fn fill(&mut self, index: usize) {
        let Some(feed) = &mut self.feed else { return };
        while self.filled <= index {
            feed.fill(self.path.segments[self.filled].clone());
            self.filled += 1;
        }
    }

    /// Has the feed take the results that are there. They are sent on meanwhile.
    fn drain(&mut self) {
        let Some(feed) = &mut self.feed else { return };
        while self.drained < self.taken {
            feed.drain(self.path.segments[self.drained].clone());
            self.drained += 1;
        }
    }

    fn accumulate(&mut self, index: usize) {
        self.fill(index);
        let Some(reduction) = &self.reduction else { return };
        let (into, from) = (self.buffer.slice(self.path.segments[index].clone()), self.landing(index));
        // SAFETY: the segment is not sent before it is reduced and not received into before it is sent; the slot's
        // receive is complete and the next one into it is not posted.
        let (into, from) = unsafe { (into.as_mut_slice(), from.as_slice()) };
        reduce::accumulate(reduction.op, reduction.dtype, into, from);
        if index >= self.path.finished {
            self.finish(index);
        }
    }

    fn finish(&self, index: usize) {
        let Some(reduction) = &self.reduction else { return };
        let segment = self.buffer.slice(self.path.segments[index].clone());
        // SAFETY: as in `accumulate`.
        reduce::finish(reduction, self.ranks, unsafe { segment.as_mut_slice() });
    }

    fn post_sends(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let before = self.sent;
        while self.sent < self.taken.min(self.path.kept) && self.sends.len() < WINDOW {
            if self.sent < self.path.own {
                self.fill(self.sent);
            }
            let segment = self.buffer.slice(self.path.segments[self.sent].clone());
            self.sends.push_back(transport.send(self.next, self.tag, segment)?);
            self.sent += 1;
        }
        Ok(self.sent > before)
    }

    fn retire(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let retired = retire(&mut self.sends, transport)?;
        self.retired += retired;
        Ok(retired > 0)
    }
}
