//! A world of one: operations are done as soon as they are submitted.

use crate::engine::Observers;
use crate::engine::observe::Phase;
use crate::engine::submission::{Completion, OpKind, Output, Submission};
use crate::wire;

/// What every operation comes down to when there is nobody else: a copy, times the scale factors.
pub(super) fn carry_out(submission: Submission, rank: usize, observers: &Observers) -> Completion {
    let Submission { name, kind, dtype, shape, input, output, .. } = submission;
    let output = match output {
        Output::InPlace => input.clone(),
        Output::Into(memory) => memory,
        Output::Allocate(allocate) => allocate(input.len()),
    };
    let factor = match kind {
        OpKind::Allreduce(options) | OpKind::Reducescatter(options) => options.prescale * options.postscale,
        _ => 1.0,
    };
    if output.as_ptr() != input.as_ptr() {
        // SAFETY: the submission owns both, and they do not overlap.
        unsafe { wire::convert(dtype, input.as_slice(), dtype, output.as_mut_slice(), factor) };
    } else if factor != 1.0 {
        // SAFETY: the submission owns the memory.
        unsafe { wire::scale(dtype, output.as_mut_slice(), factor) };
    }
    let first_dims = match kind {
        OpKind::Allgather | OpKind::Alltoall { .. } => shape.first().copied().into_iter().collect(),
        _ => Vec::new(),
    };
    let number = if kind == OpKind::Join { rank } else { 0 };
    observers.tell(&name, Phase::Done);
    Completion { first_dims, number, ..Completion::new(output) }
}
