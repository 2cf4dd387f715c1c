//! Allreduce of ranks on several hosts, some of which share a host's memory.

use std::ops::Range;
use std::sync::Arc;

use super::hosts::WORLD;
use super::{Collective, Hosts, RingAllreduce};
use crate::error::Result;
use crate::memory::Memory;
use crate::reduce::{ReduceOp, Reduction};
use crate::shm::{ShmAllgather, ShmGroup, ShmReducescatter};
use crate::transport::subset::Subset;
use crate::transport::{Tag, Transport};

/// Sum (or another reduction) over all ranks, left on all of them: reduce-scatter within each host, a ring between hosts for
/// each part, all-gather within each host.
///
/// With h hosts and p parts, a rank that carries a part sends 2(h-1)/(h·p) of the buffer to other hosts, in 2(h-1) steps;
/// what a host sends is 2(h-1)/h of the buffer, however many ranks it has. Within a host nothing touches the network.
///
/// The order of summation of an element: the ranks of a host in their order, then the hosts round the ring from the one after
/// the owner of the chunk. It depends on the chunk and on where the ranks are alone.
pub struct HierarchicalAllreduce {
    hosts: Arc<Hosts>,
    stage: Stage,
    /// What goes on within the host; both are made from the start, as a group's operations are made in one agreed order.
    within: Option<(ShmReducescatter, ShmAllgather)>,
    /// What goes on between hosts.
    between: Option<RingAllreduce>,
}

#[derive(Clone, Copy)]
enum Stage {
    Scatter,
    Between,
    Gather,
}

impl HierarchicalAllreduce {
    /// Reduces `buffer` in place, over `ranks` ranks in all. `chunks`, as many as [`Hosts::chunks`] says, in elements, cover it
    /// in order; the first of them belong to the first part. All but the memory is the same on all ranks.
    ///
    /// Scratch memory: this rank's part, and what the ring takes.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where the type does not allow the operation.
    ///
    /// # Panics
    /// If the chunks are not as many as they should be, or do not lie in the buffer.
    pub fn new(
        hosts: Arc<Hosts>,
        ranks: usize,
        buffer: Memory,
        chunks: &[Range<usize>],
        reduction: Reduction,
        tag: Tag,
        segment_bytes: usize,
    ) -> Result<Self> {
        assert_eq!(chunks.len(), hosts.chunks(), "chunks");
        let (part, within) = match &hosts.group {
            Some(group) => {
                let (part, scatter, gather) = within_host(&hosts, group, &buffer, chunks, reduction)?;
                (part, Some((scatter, gather)))
            }
            None => (buffer, None),
        };
        let between = (!hosts.carriers.is_empty()).then(|| {
            let start = hosts.part(chunks, hosts.local_rank).start;
            let own = &chunks[hosts.local_rank * hosts.count..][..hosts.count];
            let own = own.iter().map(|chunk| chunk.start - start..chunk.end - start).collect();
            RingAllreduce::new(hosts.host, hosts.count, part, own, reduction, tag, segment_bytes).over_ranks(ranks)
        });
        Ok(HierarchicalAllreduce { hosts, stage: Stage::Scatter, within, between })
    }
}

/// Where this rank's part comes to be, and what brings it there from all buffers of the host, and into all of them.
fn within_host(
    hosts: &Hosts,
    group: &Arc<ShmGroup>,
    buffer: &Memory,
    chunks: &[Range<usize>],
    reduction: Reduction,
) -> Result<(Memory, ShmReducescatter, ShmAllgather)> {
    let dtype = reduction.dtype;
    let parts: Vec<_> = (0..group.size()).map(|local_rank| hosts.part(chunks, local_rank)).collect();
    let sizes: Vec<_> = parts.iter().map(|part| part.len() * dtype.size()).collect();
    let part = Memory::zeroed(sizes[group.rank()]);
    // Whoever combines an element last divides and scales.
    let op = if reduction.op == ReduceOp::Average { ReduceOp::Sum } else { reduction.op };
    let sum = Reduction::new(dtype, op);
    let scatter = ShmReducescatter::new(group.clone(), buffer.clone(), part.clone(), parts, dtype, sum, 1.0, 1.0)?;
    let gather = ShmAllgather::new(group.clone(), part.clone(), buffer.clone(), &sizes)?;
    Ok((part, scatter, gather))
}

impl Collective for HierarchicalAllreduce {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        loop {
            if !self.poll_stage(transport)? {
                return Ok(false);
            }
            self.stage = match self.stage {
                Stage::Scatter => Stage::Between,
                Stage::Between => Stage::Gather,
                Stage::Gather => return Ok(true),
            };
        }
    }
}

impl HierarchicalAllreduce {
    fn poll_stage(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let Hosts { local, local_rank, carriers, host, .. } = &*self.hosts;
        match (self.stage, &mut self.within, &mut self.between) {
            (Stage::Scatter, Some((scatter, _)), _) => {
                scatter.poll(&mut Subset::new(transport, local, *local_rank, WORLD))
            }
            (Stage::Between, _, Some(ring)) => ring.poll(&mut Subset::new(transport, carriers, *host, WORLD)),
            (Stage::Gather, Some((_, gather)), _) => {
                gather.poll(&mut Subset::new(transport, local, *local_rank, WORLD))
            }
            _ => Ok(true),
        }
    }
}
