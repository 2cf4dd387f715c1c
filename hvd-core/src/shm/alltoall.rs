//! All-to-all through shared memory.

use std::ops::Range;
use std::sync::Arc;

use super::cut::piece_bytes;
use super::group::ShmGroup;
use super::stream::{Plan, Stream, Writers};
use crate::collective::{Collective, Splits};
use crate::error::Result;
use crate::memory::Memory;
use crate::transport::Transport;

/// Every rank's block for every rank, of any length.
///
/// Each rank's blocks for the others, that for the next rank first, are one stream of bytes that it stages piece by piece;
/// each copies its own block out of every other's stream. So while a piece is copied, each rank reads another one's slot.
pub struct ShmAlltoall {
    stream: Stream,
    plan: Alltoall,
}

struct Alltoall {
    rank: usize,
    input: Memory,
    output: Memory,
    /// Where the block for each rank lies in the input, and where it begins in this rank's stream.
    sent: Vec<Range<usize>>,
    own_starts: Vec<usize>,
    /// Where the block of each rank lies in the output, and where it begins in that rank's stream.
    received: Vec<Range<usize>>,
    starts: Vec<usize>,
    piece_bytes: usize,
    /// Whether the block that stays here has been copied.
    kept: bool,
}

impl ShmAlltoall {
    /// Sends the blocks of `input` and fills `output`, which must not overlap. The splits must be the same on all ranks.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if the memories are not as long as the splits say.
    ///
    /// # Panics
    /// If the splits are not of as many ranks as the group.
    pub fn new(group: Arc<ShmGroup>, splits: &Splits, input: Memory, output: Memory) -> Result<ShmAlltoall> {
        let (rank, size) = (group.rank(), group.size());
        assert_eq!(splits.size(), size, "splits of another number of ranks");
        splits.check(rank, &input, &output)?;
        let streams: Vec<_> = (0..size).map(|from| stream_starts(splits, from)).collect();
        let longest = streams.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        let piece_bytes = piece_bytes(longest, group.slot_bytes());
        let plan = Alltoall {
            rank,
            input,
            output,
            sent: splits.sent(rank),
            own_starts: streams[rank].0.clone(),
            received: splits.received(rank),
            starts: streams.iter().map(|(starts, _)| starts[rank]).collect(),
            piece_bytes,
            kept: false,
        };
        Ok(ShmAlltoall { stream: Stream::new(group, longest.div_ceil(piece_bytes) as u64), plan })
    }
}

/// Where the block for each rank begins in the stream of `from`, and the stream's length.
fn stream_starts(splits: &Splits, from: usize) -> (Vec<usize>, usize) {
    let size = splits.size();
    let mut starts = vec![0; size];
    let mut end = 0;
    for to in (1..size).map(|step| (from + step) % size) {
        starts[to] = end;
        end += splits.bytes(from, to);
    }
    (starts, end)
}

/// The part of a block that travels in a piece: where it lies in the piece, and where in the block.
fn overlap(start: usize, len: usize, piece: &Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
    let (first, end) = (start.max(piece.start), (start + len).min(piece.end));
    (first < end).then(|| (first - piece.start..end - piece.start, first - start..end - start))
}

impl Alltoall {
    fn piece(&self, index: u64) -> Range<usize> {
        let start = (index as usize).saturating_mul(self.piece_bytes);
        start..start.saturating_add(self.piece_bytes)
    }

    /// Copies the block that stays on this rank.
    fn keep(&mut self) {
        // SAFETY: the memories are this operation's until it completes, and do not overlap.
        unsafe {
            let block = &self.input.as_slice()[self.sent[self.rank].clone()];
            self.output.as_mut_slice()[self.received[self.rank].clone()].copy_from_slice(block);
        }
        self.kept = true;
    }
}

impl Collective for ShmAlltoall {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        if !self.plan.kept {
            self.plan.keep();
        }
        self.stream.poll(&mut self.plan, transport)
    }
}

impl Plan for Alltoall {
    fn writers(&self) -> Writers {
        Writers::All
    }

    fn reduces(&self) -> bool {
        false
    }

    fn stage(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        let span = self.piece(index);
        for to in (0..group.size()).filter(|&to| to != group.rank()) {
            let block = &self.sent[to];
            let Some((slot, part)) = overlap(self.own_starts[to], block.len(), &span) else { continue };
            // SAFETY: the input is this operation's until it completes; the slot is this rank's to write, as all ranks
            // have copied what it held before.
            unsafe {
                let bytes = &self.input.as_slice()[block.start + part.start..block.start + part.end];
                group.segment().write(group.rank(), piece, slot).copy_from_slice(bytes);
            }
        }
    }

    fn copy(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        let span = self.piece(index);
        for from in (1..group.size()).map(|step| (group.rank() + group.size() - step) % group.size()) {
            let block = &self.received[from];
            let Some((slot, part)) = overlap(self.starts[from], block.len(), &span) else { continue };
            // SAFETY: as above; the rank has staged this piece and waits for us before it writes again.
            unsafe {
                let bytes = group.segment().read(from, piece, slot);
                self.output.as_mut_slice()[block.start + part.start..block.start + part.end].copy_from_slice(bytes);
            }
        }
    }
}
