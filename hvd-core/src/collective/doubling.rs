//! Recursive doubling: few steps, each with the whole buffer. For small messages.

use super::{Collective, Reduction, settled};
use crate::error::Result;
use crate::memory::Memory;
use crate::reduce;
use crate::transport::{Request, Tag, Transport};

/// Sum (or another reduction) over all ranks, left on all of them, by exchanging whole buffers in pairs.
///
/// With p the greatest power of two not above n: each rank from p on sends its buffer to rank - p, which combines it
/// with its own; then, in log₂ p steps, ranks whose numbers differ in one bit exchange what they have and both combine
/// it, the lower rank's first; each finishes the result (Average, scale); and the ranks from p on get it back. A rank
/// below p sends log₂ p · B bytes, and B more if it serves another one. All ranks compute the same bytes, because they
/// combine the same values in the same order.
///
/// A buffer's length of scratch memory.
pub struct DoublingAllreduce {
    rank: usize,
    size: usize,
    /// The greatest power of two that is not above `size`.
    core: usize,
    reduction: Reduction,
    tag: Tag,
    buffer: Memory,
    /// What this rank has so far: the buffer or the scratch memory.
    current: Memory,
    /// Where the peer's arrives: the other one.
    incoming: Memory,
    stage: Stage,
    sending: Option<Request>,
    receiving: Option<Request>,
}

/// What the requests under way belong to.
#[derive(Clone, Copy)]
enum Stage {
    Start,
    /// A rank of the core takes in the buffer of one outside.
    FoldIn,
    /// Exchange with the rank whose number differs in this bit.
    Exchange(usize),
    /// A rank outside the core has sent its buffer, and gets the result.
    Outside,
    /// A rank of the core gives the result to one outside.
    FoldOut,
    Done,
}

impl DoublingAllreduce {
    /// Reduces `buffer` in place; length and reduction must be the same on all ranks.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn new(rank: usize, size: usize, buffer: Memory, reduction: Reduction, tag: Tag) -> Self {
        assert!(rank < size, "rank {rank} of {size}");
        DoublingAllreduce {
            rank,
            size,
            core: 1 << size.ilog2(),
            reduction,
            tag,
            current: buffer.clone(),
            incoming: Memory::zeroed(if size > 1 { buffer.len() } else { 0 }),
            buffer,
            stage: Stage::Start,
            sending: None,
            receiving: None,
        }
    }

    /// Takes in what has arrived and begins the next stage.
    fn advance(&mut self, transport: &mut dyn Transport) -> Result<()> {
        self.stage = match self.stage {
            Stage::Start if self.buffer.is_empty() => Stage::Done,
            Stage::Start if self.rank >= self.core => {
                let peer = self.rank - self.core;
                self.sending = Some(transport.send(peer, self.tag, self.buffer.clone())?);
                self.receiving = Some(transport.recv(peer, self.tag, self.incoming.clone())?);
                Stage::Outside
            }
            Stage::Start if self.rank + self.core < self.size => {
                self.receiving = Some(transport.recv(self.rank + self.core, self.tag, self.incoming.clone())?);
                Stage::FoldIn
            }
            Stage::Start => self.exchange(transport, 1)?,
            Stage::FoldIn => {
                self.combine(self.rank + self.core);
                self.exchange(transport, 1)?
            }
            Stage::Exchange(bit) => {
                self.combine(self.rank ^ bit);
                self.exchange(transport, bit << 1)?
            }
            Stage::Outside => {
                std::mem::swap(&mut self.current, &mut self.incoming);
                self.settle()
            }
            Stage::FoldOut | Stage::Done => Stage::Done,
        };
        Ok(())
    }

    /// Begins the exchange of one step, or, after the last, finishes the result and gives it away.
    fn exchange(&mut self, transport: &mut dyn Transport, bit: usize) -> Result<Stage> {
        if bit < self.core {
            let peer = self.rank ^ bit;
            self.receiving = Some(transport.recv(peer, self.tag, self.incoming.clone())?);
            self.sending = Some(transport.send(peer, self.tag, self.current.clone())?);
            return Ok(Stage::Exchange(bit));
        }
        // SAFETY: no request is under way, and the buffer is this operation's.
        reduce::finish(&self.reduction, self.size, unsafe { self.current.as_mut_slice() });
        let done = self.settle();
        if self.rank + self.core < self.size {
            self.sending = Some(transport.send(self.rank + self.core, self.tag, self.buffer.clone())?);
            return Ok(Stage::FoldOut);
        }
        Ok(done)
    }

    /// Combines what came from `peer` with what is here, the lower rank's first.
    fn combine(&mut self, peer: usize) {
        if peer < self.rank {
            std::mem::swap(&mut self.current, &mut self.incoming);
        }
        // SAFETY: no request is under way, and the two do not overlap.
        let (into, from) = unsafe { (self.current.as_mut_slice(), self.incoming.as_slice()) };
        reduce::accumulate(self.reduction.op, self.reduction.dtype, into, from);
    }

    /// Brings the result into the caller's buffer if it is not there.
    fn settle(&mut self) -> Stage {
        if self.current.as_ptr() != self.buffer.as_ptr() {
            // SAFETY: no request is under way, and the scratch memory does not overlap the buffer.
            unsafe { self.buffer.as_mut_slice().copy_from_slice(self.current.as_slice()) };
        }
        Stage::Done
    }
}

impl Collective for DoublingAllreduce {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        loop {
            // Both are tested each time: neither may starve the other of its completion.
            let sent = settled(&mut self.sending, transport)?;
            let received = settled(&mut self.receiving, transport)?;
            if !(sent && received) {
                return Ok(false);
            }
            if matches!(self.stage, Stage::Done) {
                return Ok(true);
            }
            self.advance(transport)?;
        }
    }
}
