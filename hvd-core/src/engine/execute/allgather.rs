//! All ranks' elements, one rank's after the other's, on all ranks.

use std::ops::Range;

use super::{Finished, Operation, Simple, copy_bytes, inputs};
use crate::collective::{Allgather, Collective};
use crate::dtype::DType;
use crate::engine::backend::Backend;
use crate::engine::entry::Item;
use crate::engine::fusion::Batch;
use crate::engine::staging::{Conversion, Staging, consecutive};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::shm::ShmAllgather;

/// Prepares the gathering of tensors. Several go through a buffer in which each rank's parts of all of them are one chunk.
pub(super) fn start(batch: &mut Batch, backend: &mut Backend) -> Result<Box<dyn Operation>> {
    let Batch { items, segment_bytes, .. } = batch;
    let parts: Vec<_> = items.iter().map(parts).collect::<Result<_>>()?;
    let total = |parts: &Vec<Range<usize>>| parts.last().map_or(0, |last| last.end);
    let resolve = |(item, parts): (&mut Item, &Vec<Range<usize>>)| item.resolve_output(total(parts));
    let outputs: Vec<_> = items.iter_mut().zip(&parts).map(resolve).collect();
    let first_dims = items.iter().map(|item| item.first_dims.clone()).collect();
    if let ([item], [output]) = (&items[..], &outputs[..]) {
        let collective =
            collective(item.submission.input.clone(), output.clone(), parts[0].clone(), *segment_bytes, backend)?;
        return Ok(Simple::operation(collective, || Finished { outputs, first_dims, buffer: None }));
    }
    let staging = Staging::new(parts, Conversion::none(DType::U8), backend.take_buffer());
    let own = own_chunk(&staging, &inputs(&*items), backend.rank);
    let collective = collective(own, staging.buffer(), staging.chunks(), *segment_bytes, backend)?;
    Ok(Simple::operation(collective, || {
        let buffer = staging.copy_out(&outputs);
        Finished { outputs, first_dims, buffer }
    }))
}

/// Where each rank's rows of a tensor lie in the result, in bytes.
fn parts(item: &Item) -> Result<Vec<Range<usize>>> {
    let submission = &item.submission;
    let row: usize = submission.shape[1..].iter().product::<usize>() * submission.dtype.size();
    let sizes: Option<Vec<usize>> = item.first_dims.iter().map(|rows| rows.checked_mul(row)).collect();
    let sizes = sizes.filter(|sizes| sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size)).is_some());
    sizes.map(consecutive).ok_or_else(|| Error::Invalid(format!("`{}`: the gathered size overflows", submission.name)))
}

/// This rank's chunk of the buffer, filled.
fn own_chunk(staging: &Staging, inputs: &[Memory], rank: usize) -> Memory {
    let chunk = staging.chunk(rank);
    let places = consecutive(inputs.iter().map(Memory::len));
    inputs.iter().zip(places).for_each(|(input, place)| copy_bytes(input, &chunk.slice(place)));
    chunk
}

/// Moves each rank's `input` to its range of `output`, in bytes.
pub(super) fn collective(
    input: Memory,
    output: Memory,
    ranges: Vec<Range<usize>>,
    segment_bytes: usize,
    backend: &mut Backend,
) -> Result<Box<dyn Collective>> {
    let (rank, size, tag) = (backend.rank, backend.size, backend.next_tag());
    Ok(match &backend.shared {
        Some(group) => {
            let sizes: Vec<_> = ranges.iter().map(Range::len).collect();
            Box::new(ShmAllgather::new(group.clone(), input, output, &sizes)?)
        }
        None => {
            copy_bytes(&input, &output.slice(ranges[rank].clone()));
            Box::new(Allgather::new(rank, size, output, ranges, tag, segment_bytes))
        }
    })
}
