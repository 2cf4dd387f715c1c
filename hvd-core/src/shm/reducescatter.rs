//! Reduce-scatter through shared memory.

use std::ops::Range;
use std::sync::Arc;

use super::cut::piece_bytes;
use super::group::ShmGroup;
use super::stream::{Plan, Stream, Writers};
use crate::collective::{Collective, Reduction};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce::combine;
use crate::transport::Transport;
use crate::wire::convert;

/// Bytes that are combined at once: they stay in the first-level cache while they are copied further.
const BLOCK_BYTES: usize = 8 << 10;

/// Each rank's chunk of the combined elements, on that rank.
///
/// A rank's slot is divided among the ranks: each stages the others' shares of a piece, converted, and combines its own
/// chunk's out of all slots and its input, in the order of ranks. So the bits are those of [`super::ShmAllreduce`].
pub struct ShmReducescatter {
    stream: Stream,
    plan: Reducescatter,
}

struct Reducescatter {
    input: Memory,
    output: Memory,
    /// Each rank's chunk of the input, in elements.
    chunks: Vec<Range<usize>>,
    user: DType,
    reduction: Reduction,
    prescale: f64,
    postscale: f64,
    /// Elements of a chunk that travel in one piece.
    share: usize,
    /// This rank's elements as they would travel, and results before they are converted back.
    scratch: [Vec<u8>; 2],
}

impl ShmReducescatter {
    /// Combines chunk `rank` of every rank's `input` into `output`, which must not overlap. `chunks`, one per rank, are in
    /// elements and the same on all ranks; the rest is as for [`super::ShmAllreduce::new`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if the memories do not fit the chunks, the types do not allow the operation, or the group's slots
    /// are too small for an element for each rank.
    #[allow(clippy::too_many_arguments)] // They are what the operation is.
    pub fn new(
        group: Arc<ShmGroup>,
        input: Memory,
        output: Memory,
        chunks: Vec<Range<usize>>,
        user: DType,
        reduction: Reduction,
        prescale: f64,
        postscale: f64,
    ) -> Result<ShmReducescatter> {
        super::allreduce::check_types(user, &reduction)?;
        check(&group, &input, &output, &chunks, user)?;
        let longest = chunks.iter().map(Range::len).max().unwrap_or(0);
        let wire = reduction.dtype.size();
        let slot_elements = piece_bytes(longest.saturating_mul(wire * group.size()), group.slot_bytes()) / wire;
        let share = slot_elements / group.size();
        if share == 0 {
            let (bytes, ranks) = (group.slot_bytes(), group.size());
            return Err(Error::Invalid(format!("slots of {bytes} bytes are too small to scatter among {ranks} ranks")));
        }
        let stream = Stream::new(group, longest.div_ceil(share) as u64);
        let scratch = Default::default();
        let plan = Reducescatter { input, output, chunks, user, reduction, prescale, postscale, share, scratch };
        Ok(ShmReducescatter { stream, plan })
    }
}

fn check(group: &ShmGroup, input: &Memory, output: &Memory, chunks: &[Range<usize>], user: DType) -> Result<()> {
    let elements = input.len() / user.size();
    let fit = chunks.iter().all(|chunk| chunk.start <= chunk.end && chunk.end <= elements);
    if chunks.len() != group.size() || !fit || output.len() != chunks[group.rank()].len() * user.size() {
        let (input, output) = (input.len(), output.len());
        return Err(Error::Invalid(format!(
            "reducescatter of {input} into {output} bytes of {user}, chunks {chunks:?}"
        )));
    }
    Ok(())
}

impl Collective for ShmReducescatter {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.stream.poll(&mut self.plan, transport)
    }
}

impl Reducescatter {
    /// The elements of a rank's chunk that travel in a piece.
    fn span(&self, rank: usize, index: u64) -> Range<usize> {
        let chunk = &self.chunks[rank];
        let start = (index as usize).saturating_mul(self.share).min(chunk.len());
        chunk.start + start..chunk.start + start.saturating_add(self.share).min(chunk.len())
    }

    /// Where the share of a rank lies in every slot, from its element `skip` on.
    fn place(&self, rank: usize, skip: usize, elements: usize) -> Range<usize> {
        let (wire, start) = (self.reduction.dtype.size(), rank * self.share + skip);
        start * wire..(start + elements) * wire
    }

    /// Elements of this rank's input.
    ///
    /// # Safety
    /// Nobody may write them while the slice is in use.
    unsafe fn own(&self, elements: Range<usize>) -> &[u8] {
        let user = self.user.size();
        // SAFETY: the caller's.
        unsafe { &self.input.as_slice()[elements.start * user..elements.end * user] }
    }

    /// Combines a block of this rank's chunk, whose elements are `skip` into the piece's, into the output.
    fn combine_block(&mut self, group: &ShmGroup, piece: u64, block: Range<usize>, skip: usize) {
        let (user, wire) = (self.user.size(), self.reduction.dtype.size());
        let [mut own, mut result] = std::mem::take(&mut self.scratch);
        own.resize(block.len() * wire, 0);
        result.resize(block.len() * wire, 0);
        let place = self.place(group.rank(), skip, block.len());
        let start = self.chunks[group.rank()].start;
        // SAFETY: the memories are this operation's until it completes and do not overlap; all ranks have staged this piece
        // and none writes to its slot before this rank has copied it.
        unsafe {
            convert(self.user, self.own(block.clone()), self.reduction.dtype, &mut own, self.prescale);
            let share = |rank: usize| match rank == group.rank() {
                true => &own[..],
                false => group.segment().read(rank, piece, place.clone()),
            };
            let shares: Vec<_> = (0..group.size()).map(share).collect();
            combine(self.reduction.op, self.reduction.dtype, &mut result, &shares, self.reduction.scale);
            let output = &mut self.output.as_mut_slice()[(block.start - start) * user..(block.end - start) * user];
            convert(self.reduction.dtype, &result, self.user, output, self.postscale);
        }
        self.scratch = [own, result];
    }
}

impl Plan for Reducescatter {
    fn writers(&self) -> Writers {
        Writers::All
    }

    fn reduces(&self) -> bool {
        false
    }

    fn stage(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        for rank in (0..group.size()).filter(|&rank| rank != group.rank()) {
            let span = self.span(rank, index);
            // SAFETY: the input is this operation's until it completes; the slot is this rank's to write, as all ranks have
            // copied what it held before.
            unsafe {
                let slot = group.segment().write(group.rank(), piece, self.place(rank, 0, span.len()));
                convert(self.user, self.own(span), self.reduction.dtype, slot, self.prescale);
            }
        }
    }

    fn copy(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        let span = self.span(group.rank(), index);
        let step = BLOCK_BYTES / self.reduction.dtype.size();
        for start in span.clone().step_by(step) {
            let block = start..span.end.min(start + step);
            self.combine_block(group, piece, block, start - span.start);
        }
    }
}
