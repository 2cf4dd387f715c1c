//! The root's elements to all ranks.

use super::{Finished, Operation, Simple, copy_bytes};
use crate::collective::{Broadcast, Collective};
use crate::engine::backend::Backend;
use crate::engine::fusion::Batch;
use crate::error::{Error, Result};
use crate::shm::ShmBroadcast;

/// Prepares the broadcast of one tensor. `root`: a rank of the world.
pub(super) fn start(root: usize, batch: &mut Batch, backend: &mut Backend) -> Result<Box<dyn Operation>> {
    let item = &mut batch.items[0];
    let not_here = || Error::Invalid(format!("`{}`: root {root} is not in the process set", item.submission.name));
    let root = backend.position(root).ok_or_else(not_here)?;
    let input = item.submission.input.clone();
    let output = item.resolve_output(input.len());
    if backend.rank == root {
        copy_bytes(&input, &output);
    }
    let (rank, size, tag) = (backend.rank, backend.size, backend.next_tag());
    let collective: Box<dyn Collective> = match &backend.shared {
        Some(group) => Box::new(ShmBroadcast::new(group.clone(), output.clone(), root)?),
        None => Box::new(Broadcast::new(rank, size, root, output.clone(), tag, batch.segment_bytes)),
    };
    Ok(Simple::operation(collective, || Finished { outputs: vec![output], ..Finished::default() }))
}
