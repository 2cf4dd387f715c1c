//! Allreduce of memory that all ranks reach: nothing is staged.

use std::sync::Arc;

use super::allreduce::Inputs;
use super::cut::{Cut, Run};
use super::group::ShmGroup;
use super::stream::{Plan, Stream, Writers};
use crate::collective::{Collective, Reduction};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce::{combine, combine_both};
use crate::transport::Transport;

/// Bytes that are combined at once: they stay in the first-level cache until all ranks have them.
const BLOCK_BYTES: usize = 8 << 10;
/// Bytes after which the ranks wait for each other, and the engine can look after other things.
const PIECE_BYTES: usize = 1 << 20;

/// Combines the ranks' elements where they lie: each rank reads its share of a piece out of all ranks' buffers and writes
/// the result into all of them. The bits are those of [`super::ShmAllreduce`].
///
/// For a payload of `n` bytes on `p` ranks a rank reads `n` and writes `n` bytes; one wait per piece, for all to have written.
/// That all have handed in their buffers is for the caller to know: the engine begins what all ranks have submitted.
pub struct ShmInPlaceAllreduce {
    stream: Stream,
    plan: InPlace,
}

struct InPlace {
    /// Where each part begins in each rank's arena.
    parts: Vec<Vec<usize>>,
    cut: Cut,
    reduction: Reduction,
    scratch: Vec<u8>,
}

impl ShmInPlaceAllreduce {
    /// Reduces `parts`, each of which must have a [`ShmGroup::place`], the same on all ranks.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a part has no place or is no whole number of elements, or the type does not allow the
    /// operation.
    pub fn new(group: Arc<ShmGroup>, parts: &[Memory], reduction: Reduction) -> Result<ShmInPlaceAllreduce> {
        let size = reduction.dtype.size();
        let whole = parts.iter().all(|part| part.len() % size == 0);
        let starts: Option<Vec<_>> = parts.iter().map(|part| group.starts(part)).collect();
        let (Some(starts), true, true) = (starts, whole, reduction.op.supports(reduction.dtype)) else {
            return Err(Error::Invalid(format!("{reduction:?} in place of memory that is not fit for it")));
        };
        let elements = parts.iter().map(|part| part.len() / size);
        let cut = Cut::of_pieces(elements, size, group.size(), PIECE_BYTES);
        let stream = Stream::new(group, cut.pieces());
        Ok(ShmInPlaceAllreduce { stream, plan: InPlace { parts: starts, cut, reduction, scratch: Vec::new() } })
    }
}

impl Collective for ShmInPlaceAllreduce {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.stream.poll(&mut self.plan, transport)
    }
}

impl InPlace {
    /// Where a run lies in a rank's buffer.
    fn at(&self, group: &ShmGroup, run: &Run, rank: usize) -> *mut u8 {
        let start = self.parts[run.part][rank];
        group.segment().region(rank, &(start + run.user.start..start + run.user.end))
    }

    fn reduce_both(&self, group: &ShmGroup, run: &Run) {
        // SAFETY: all ranks have handed in their buffers, which lie in different arenas, and get them back at the end of the operation;
        // in this share only this rank reads and writes until it announces that it has reduced it.
        let [first, second] =
            [0, 1].map(|rank| unsafe { std::slice::from_raw_parts_mut(self.at(group, run, rank), run.user.len()) });
        combine_both(self.reduction.op, self.reduction.dtype, first, second, self.reduction.scale);
    }

    fn reduce_all(&self, group: &ShmGroup, run: &Run, scratch: &mut [u8]) {
        let result = &mut scratch[..run.user.len()];
        // SAFETY: as in `reduce_both`; here they are read.
        let input = |rank: usize| unsafe { std::slice::from_raw_parts(self.at(group, run, rank), run.user.len()) };
        let inputs: Inputs = (0..group.size()).map(input).collect();
        combine(self.reduction.op, self.reduction.dtype, result, &inputs, self.reduction.scale);
        for rank in 0..group.size() {
            // SAFETY: as in `reduce_both`; the slices that were read are gone.
            unsafe { std::slice::from_raw_parts_mut(self.at(group, run, rank), result.len()) }.copy_from_slice(result);
        }
    }
}

impl Plan for InPlace {
    fn writers(&self) -> Writers {
        Writers::Nobody
    }

    fn reduces(&self) -> bool {
        true
    }

    fn stage(&mut self, _group: &ShmGroup, _piece: u64, _index: u64) {}

    fn reduce(&mut self, group: &ShmGroup, _piece: u64, index: u64) {
        let share = self.cut.share(index, group.rank());
        match group.size() {
            // One pass over both buffers; no need to stay in a cache on the way.
            2 => self.cut.runs(index, share, usize::MAX).for_each(|run| self.reduce_both(group, &run)),
            _ => {
                let mut scratch = std::mem::take(&mut self.scratch);
                scratch.resize(BLOCK_BYTES, 0);
                self.cut.runs(index, share, BLOCK_BYTES).for_each(|run| self.reduce_all(group, &run, &mut scratch));
                self.scratch = scratch;
            }
        }
    }

    fn copy(&mut self, _group: &ShmGroup, _piece: u64, _index: u64) {}
}
