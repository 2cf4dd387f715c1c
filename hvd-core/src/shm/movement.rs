//! Operations that move bytes and combine nothing.

use std::sync::Arc;

use super::group::ShmGroup;
use super::stream::{Plan, Stream, Writers};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::Transport;

/// The bytes of a piece of a buffer of `len` bytes.
fn piece_of(len: usize, slot_bytes: usize, index: u64) -> std::ops::Range<usize> {
    let start = (index as usize).saturating_mul(slot_bytes).min(len);
    start..start.saturating_add(slot_bytes).min(len)
}

/// The root's bytes to everybody: the root stages piece by piece, the others copy out.
pub struct ShmBroadcast {
    stream: Stream,
    plan: Broadcast,
}

struct Broadcast {
    memory: Memory,
    root: usize,
}

impl ShmBroadcast {
    /// Broadcasts `memory` of rank `root` into `memory` of all others, which is of the same length.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such root.
    pub fn new(group: Arc<ShmGroup>, memory: Memory, root: usize) -> Result<ShmBroadcast> {
        if root >= group.size() {
            return Err(Error::Invalid(format!("broadcast from rank {root} of {}", group.size())));
        }
        let pieces = memory.len().div_ceil(group.slot_bytes()) as u64;
        Ok(ShmBroadcast { stream: Stream::new(group, pieces), plan: Broadcast { memory, root } })
    }
}

impl Collective for ShmBroadcast {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.stream.poll(&mut self.plan, transport)
    }
}

impl Plan for Broadcast {
    fn writers(&self) -> Writers {
        Writers::One(self.root)
    }

    fn reduces(&self) -> bool {
        false
    }

    fn stage(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        let range = piece_of(self.memory.len(), group.slot_bytes(), index);
        // SAFETY: the memory is this operation's until it completes; the slot is this rank's to write, as all ranks
        // have copied what it held before.
        unsafe {
            let slot = group.segment().write(self.root, piece, 0..range.len());
            slot.copy_from_slice(&self.memory.as_slice()[range]);
        }
    }

    fn copy(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        if group.rank() == self.root {
            return;
        }
        let range = piece_of(self.memory.len(), group.slot_bytes(), index);
        // SAFETY: as above; the root has staged this piece and waits for us before it writes again.
        unsafe {
            let slot = group.segment().read(self.root, piece, 0..range.len());
            self.memory.as_mut_slice()[range].copy_from_slice(slot);
        }
    }
}

/// Everybody's bytes to everybody, one after the other in the order of ranks; lengths may differ.
pub struct ShmAllgather {
    stream: Stream,
    plan: Allgather,
}

struct Allgather {
    input: Memory,
    output: Memory,
    /// Where each rank's bytes begin in the output, and where the last rank's end.
    starts: Vec<usize>,
}

impl ShmAllgather {
    /// Gathers `input`, of `sizes[rank]` bytes, of all ranks into `output`. The input may be its own place in the output.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the lengths do not fit together.
    pub fn new(group: Arc<ShmGroup>, input: Memory, output: Memory, sizes: &[usize]) -> Result<ShmAllgather> {
        let mut starts = vec![0usize];
        for size in sizes {
            let end = starts[starts.len() - 1].checked_add(*size);
            starts.push(end.ok_or_else(|| Error::Invalid("allgather: more bytes than there are addresses".into()))?);
        }
        let fits = sizes.len() == group.size() && input.len() == sizes[group.rank()];
        if !fits || output.len() != starts[sizes.len()] {
            let (input, output) = (input.len(), output.len());
            return Err(Error::Invalid(format!("allgather of {input} into {output} bytes, of {sizes:?} by rank")));
        }
        let most = sizes.iter().copied().max().unwrap_or(0);
        let pieces = most.div_ceil(group.slot_bytes()) as u64;
        Ok(ShmAllgather { stream: Stream::new(group, pieces), plan: Allgather { input, output, starts } })
    }
}

impl Collective for ShmAllgather {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.stream.poll(&mut self.plan, transport)
    }
}

impl Plan for Allgather {
    fn writers(&self) -> Writers {
        Writers::All
    }

    fn reduces(&self) -> bool {
        false
    }

    fn stage(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        let range = piece_of(self.input.len(), group.slot_bytes(), index);
        // SAFETY: the memories are this operation's until it completes, and `ptr::copy` bears that the input is its own
        // place in the output; the slot is this rank's to write, as all ranks have copied what it held before.
        unsafe {
            let slot = group.segment().write(group.rank(), piece, 0..range.len());
            slot.copy_from_slice(&self.input.as_slice()[range.clone()]);
            let at = self.starts[group.rank()] + range.start;
            std::ptr::copy(self.input.as_ptr().add(range.start), self.output.as_ptr().add(at), range.len());
        }
    }

    fn copy(&mut self, group: &ShmGroup, piece: u64, index: u64) {
        for rank in (0..group.size()).filter(|&rank| rank != group.rank()) {
            let (start, end) = (self.starts[rank], self.starts[rank + 1]);
            let range = piece_of(end - start, group.slot_bytes(), index);
            // SAFETY: as above; the rank has staged this piece and waits for us before it writes again.
            unsafe {
                let slot = group.segment().read(rank, piece, 0..range.len());
                self.output.as_mut_slice()[start + range.start..start + range.end].copy_from_slice(slot);
            }
        }
    }
}

/// Done on a rank once all ranks have begun it.
pub struct ShmBarrier {
    stream: Stream,
}

struct Nothing;

impl ShmBarrier {
    /// A barrier among all ranks of the group.
    pub fn new(group: Arc<ShmGroup>) -> ShmBarrier {
        ShmBarrier { stream: Stream::new(group, 1) }
    }
}

impl Collective for ShmBarrier {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.stream.poll(&mut Nothing, transport)
    }
}

impl Plan for Nothing {
    fn writers(&self) -> Writers {
        Writers::All
    }

    fn reduces(&self) -> bool {
        false
    }

    fn stage(&mut self, _group: &ShmGroup, _piece: u64, _index: u64) {}

    fn copy(&mut self, _group: &ShmGroup, _piece: u64, _index: u64) {}
}
