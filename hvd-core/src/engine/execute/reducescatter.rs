//! Every rank's elements combined, each rank's share of the rows on that rank.

use std::ops::Range;

use super::allreduce::Treatment;
use super::{Finished, Operation, Simple, inputs};
use crate::collective::{Collective, Reducescatter, even_chunks};
use crate::engine::backend::Backend;
use crate::engine::entry::Item;
use crate::engine::fusion::Batch;
use crate::engine::staging::{Conversion, Staging, consecutive};
use crate::error::Result;
use crate::memory::Memory;
use crate::shm::ShmReducescatter;
use crate::wire;

/// Prepares the reducescatter of tensors of one type. Several, or those that are converted for a transport, go through a
/// buffer in which each rank's shares of all of them are one chunk.
pub(super) fn start(batch: &mut Batch, backend: &mut Backend) -> Result<Box<dyn Operation>> {
    let user = batch.items[0].submission.dtype;
    let treatment = Treatment::of(batch, backend.size, false);
    let Batch { items, segment_bytes, .. } = batch;
    let shares: Vec<_> = items.iter().map(|item| shares(&item.submission.shape, backend.size)).collect();
    let own: Vec<_> = shares.iter().map(|shares| shares[backend.rank].len()).collect();
    let resolve = |(item, elements): (&mut Item, &usize)| item.resolve_output(elements * user.size());
    let outputs: Vec<_> = items.iter_mut().zip(&own).map(resolve).collect();
    if let ([item], [output], true) = (&items[..], &outputs[..], treatment.is_plain() || backend.shared.is_some()) {
        let input = item.submission.input.clone();
        let collective = collective(treatment, input, output.clone(), shares[0].clone(), *segment_bytes, backend)?;
        return Ok(Simple::operation(collective, move || {
            treatment.finish(&outputs);
            Finished { outputs, ..Finished::default() }
        }));
    }
    // In shared memory elements are converted on the way through it.
    let (outside, inside) = match backend.shared {
        Some(_) => (Conversion::none(user), treatment),
        None => (treatment.conversion, treatment.inside()),
    };
    let staging = Staging::new(shares, outside, backend.take_buffer());
    staging.copy_in(&inputs(items));
    let result = Memory::zeroed(own.iter().sum::<usize>() * outside.wire.size());
    let collective = collective(inside, staging.buffer(), result.clone(), staging.chunks(), *segment_bytes, backend)?;
    Ok(Simple::operation(collective, move || {
        hand_out(&result, outside, &own, &outputs);
        treatment.finish(&outputs);
        Finished { outputs, buffer: staging.into_buffer(), ..Finished::default() }
    }))
}

fn collective(
    treatment: Treatment,
    input: Memory,
    output: Memory,
    chunks: Vec<Range<usize>>,
    segment_bytes: usize,
    backend: &mut Backend,
) -> Result<Box<dyn Collective>> {
    let Treatment { conversion: Conversion { user, prescale, postscale, .. }, reduction, .. } = treatment;
    let (rank, tag) = (backend.rank, backend.next_tag());
    Ok(match backend.shared.clone() {
        Some(group) => {
            Box::new(ShmReducescatter::new(group, input, output, chunks, user, reduction, prescale, postscale)?)
        }
        None => Box::new(Reducescatter::new(rank, &input, output, &chunks, reduction, tag, segment_bytes)?),
    })
}

/// Each rank's share of the rows, in elements.
fn shares(shape: &[usize], ranks: usize) -> Vec<Range<usize>> {
    let row: usize = shape[1..].iter().product();
    even_chunks(shape[0], ranks).into_iter().map(|rows| rows.start * row..rows.end * row).collect()
}

/// Puts this rank's chunk, which holds so many `elements` of each tensor, where the user wants them.
fn hand_out(chunk: &Memory, conversion: Conversion, elements: &[usize], outputs: &[Memory]) {
    let Conversion { user, wire, postscale, .. } = conversion;
    let places = consecutive(elements.iter().map(|elements| elements * wire.size()));
    for (place, output) in places.into_iter().zip(outputs) {
        let from = chunk.slice(place);
        // SAFETY: the collective is done and the handles are not complete yet: nobody else uses the memory.
        unsafe { wire::convert(wire, from.as_slice(), user, output.as_mut_slice(), postscale) };
    }
}
