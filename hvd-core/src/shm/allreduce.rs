//! Allreduce through shared memory.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::cut::{Cut, Run};
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

/// What is combined: a slice of each rank. A block takes less than a microsecond, so this allocates for many ranks only.
pub(super) type Inputs<'a> = SmallVec<[&'a [u8]; 16]>;

/// One tensor of a (fused) allreduce.
pub struct Part {
    /// What this rank contributes, in the user's element type.
    pub input: Memory,
    /// Where the result goes; the same memory as `input`, or memory that overlaps no part's input.
    pub output: Memory,
    /// Number of elements in both.
    pub elements: usize,
}

/// Combines the ranks' elements, for a list of tensors in one go.
///
/// The tensors are one stream of elements, cut into pieces. The bits of an element's result depend on the ranks'
/// values, the operation and the number of ranks alone: all of them come out of `combine` over the ranks in order, in
/// whatever piece, block and path an element happens to be.
pub struct ShmAllreduce {
    stream: Stream,
    plan: Allreduce,
}

impl ShmAllreduce {
    /// Reduces `parts`, which all ranks list with the same numbers of elements, of type `user`.
    ///
    /// Elements are multiplied by `prescale`, converted to `reduction.dtype`, combined in the order of ranks, multiplied by
    /// `reduction.scale`, rounded, converted back and multiplied by `postscale`. Integers are never scaled.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a memory is not as long as its elements, or the types do not allow the operation.
    pub fn new(
        group: Arc<ShmGroup>,
        parts: Vec<Part>,
        user: DType,
        reduction: Reduction,
        prescale: f64,
        postscale: f64,
    ) -> Result<ShmAllreduce> {
        check_types(user, &reduction)?;
        check(&parts, user)?;
        let sizes = (user.size(), reduction.dtype.size());
        let elements = parts.iter().map(|part| part.elements);
        let cut = Cut::new(elements, sizes.0, sizes.1, group.size(), group.slot_bytes());
        let stream = Stream::new(group, cut.pieces());
        Ok(ShmAllreduce {
            stream,
            plan: Allreduce { parts, cut, user, reduction, prescale, postscale, scratch: Vec::new() },
        })
    }
}

/// Refuses an operation that is not defined for a type, or a conversion that there is not.
pub(super) fn check_types(user: DType, reduction: &Reduction) -> Result<()> {
    let wire = reduction.dtype;
    let wide = matches!(user, DType::F32 | DType::F64);
    let narrow = matches!(wire, DType::F16 | DType::BF16);
    if !reduction.op.supports(wire) || !reduction.op.is_elementwise() || (user != wire && !(wide && narrow)) {
        return Err(Error::Invalid(format!("{:?} of {user} as {wire} is not defined", reduction.op)));
    }
    Ok(())
}

fn check(parts: &[Part], user: DType) -> Result<()> {
    for Part { input, output, elements } in parts {
        let bytes = elements.checked_mul(user.size());
        if bytes != Some(input.len()) || bytes != Some(output.len()) {
            let (input, output) = (input.len(), output.len());
            return Err(Error::Invalid(format!("{elements} elements of {user} in {input}, out {output} bytes")));
        }
    }
    Ok(())
}

impl Collective for ShmAllreduce {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.stream.poll(&mut self.plan, transport)
    }
}

struct Allreduce {
    parts: Vec<Part>,
    cut: Cut,
    user: DType,
    reduction: Reduction,
    prescale: f64,
    postscale: f64,
    /// Elements of the wire's type on their way from or to a part.
    scratch: Vec<u8>,
}

impl Allreduce {
    /// This rank's elements as they travel: its input itself where that is the same, else a conversion.
    ///
    /// # Safety
    /// Nobody may write the run's input while the slice is in use.
    unsafe fn own<'a>(&'a self, run: &Run, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        // SAFETY: the caller's.
        let input = unsafe { &self.parts[run.part].input.as_slice()[run.user.clone()] };
        if self.user == self.reduction.dtype && (self.prescale == 1.0 || !self.user.is_float()) {
            return input;
        }
        let scratch = room(scratch, run);
        convert(self.user, input, self.reduction.dtype, scratch, self.prescale);
        scratch
    }

    /// Writes results to where the user wants them.
    ///
    /// # Safety
    /// Nobody else may read or write the run's output.
    unsafe fn deliver(&self, run: &Run, result: &[u8]) {
        // SAFETY: the caller's.
        let output = unsafe { &mut self.parts[run.part].output.as_mut_slice()[run.user.clone()] };
        convert(self.reduction.dtype, result, self.user, output, self.postscale);
    }

    fn combine(&self, out: &mut [u8], inputs: &[&[u8]]) {
        combine(self.reduction.op, self.reduction.dtype, out, inputs, self.reduction.scale);
    }

    /// Copies elements of this rank into its slot.
    fn fill(&self, group: &ShmGroup, piece: u64, index: u64, elements: Range<usize>) {
        for run in self.cut.runs(index, elements, usize::MAX) {
            // SAFETY: the parts are this operation's until it completes; the slot is this rank's to write, as all ranks
            // have copied what it held before, and the others read it only once this is announced.
            unsafe {
                let slot = group.segment().write(group.rank(), piece, run.wire);
                let input = &self.parts[run.part].input.as_slice()[run.user];
                convert(self.user, input, self.reduction.dtype, slot, self.prescale);
            }
        }
    }

    /// Combines all slots into the output.
    fn combine_all(&self, group: &ShmGroup, piece: u64, index: u64, scratch: &mut Vec<u8>) {
        for run in self.cut.runs(index, self.cut.span(index), BLOCK_BYTES) {
            let result = room(scratch, &run);
            // SAFETY: all ranks have staged this piece and none writes to its slot before this rank has copied it.
            let slots = (0..group.size()).map(|rank| unsafe { group.segment().read(rank, piece, run.wire.clone()) });
            self.combine(result, &slots.collect::<Inputs>());
            // SAFETY: the parts are this operation's until it completes.
            unsafe { self.deliver(&run, result) };
        }
    }

    /// Combines this rank's share of all slots into its slot and its output. The share was not staged: nobody else
    /// reads it in this slot before the result is announced.
    fn combine_share(&self, group: &ShmGroup, piece: u64, index: u64, scratch: &mut Vec<u8>) {
        for run in self.cut.runs(index, self.cut.share(index, group.rank()), BLOCK_BYTES) {
            // SAFETY: the parts are this operation's until it completes. All ranks have staged this piece. What is read
            // of their slots, only this rank uses until it announces that it has reduced it; what is written in its own
            // slot likewise.
            unsafe {
                let own = self.own(&run, scratch);
                let segment = group.segment();
                let slots = (0..group.size()).map(|rank| match rank == group.rank() {
                    true => own,
                    false => segment.read(rank, piece, run.wire.clone()),
                });
                let result = segment.write(group.rank(), piece, run.wire.clone());
                self.combine(result, &slots.collect::<Inputs>());
                self.deliver(&run, result);
            }
        }
    }
}

/// As much of the scratch space as the run needs.
fn room<'a>(scratch: &'a mut Vec<u8>, run: &Run) -> &'a mut [u8] {
    if scratch.len() < run.wire.len() {
        scratch.resize(run.wire.len(), 0);
    }
    &mut scratch[..run.wire.len()]
}

impl Plan for Allreduce {
    fn writers(&self) -> Writers {
        Writers::All
    }

    fn reduces(&self) -> bool {
        !self.cut.is_direct()
    }

    fn stage(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        let span = self.cut.span(index);
        if self.cut.is_direct() {
            return self.fill(group, piece, index, span);
        }
        let share = self.cut.share(index, group.rank());
        self.fill(group, piece, index, span.start..share.start);
        self.fill(group, piece, index, share.end..span.end);
    }

    fn reduce(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        let mut scratch = std::mem::take(&mut self.scratch);
        self.combine_share(group, piece, index, &mut scratch);
        self.scratch = scratch;
    }

    fn copy(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        if self.cut.is_direct() {
            let mut scratch = std::mem::take(&mut self.scratch);
            self.combine_all(group, piece, index, &mut scratch);
            self.scratch = scratch;
            return;
        }
        for rank in (0..group.size()).filter(|&rank| rank != group.rank()) {
            for run in self.cut.runs(index, self.cut.share(index, rank), usize::MAX) {
                // SAFETY: the rank has reduced its share and does not write to it before this rank has copied it; the
                // parts are this operation's until it completes.
                unsafe { self.deliver(&run, group.segment().read(rank, piece, run.wire.clone())) };
            }
        }
    }
}
