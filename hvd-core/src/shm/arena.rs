//! Memory of a rank that all ranks of its group reach, so that they reduce it in place.
//!
//! Each rank hands out parts of its own arena and frees them when it likes. A region becomes a *buffer* once the ranks have
//! told each other where theirs begin; then memory within it is recognised by its address. A peer reads and writes it only
//! within an operation that this rank takes part in.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::group::ShmGroup;
use super::segment::{LARGE_PAGE, PAGE};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// What a rank has handed out.
#[derive(Default)]
pub(super) struct Regions {
    /// Where regions end, by where they begin.
    taken: BTreeMap<usize, usize>,
    /// Those that all ranks know, by where they begin on this rank.
    buffers: BTreeMap<usize, Buffer>,
}

struct Buffer {
    number: u64,
    len: usize,
    /// Where it begins in each rank's arena.
    starts: Vec<usize>,
}

/// A place that all ranks know: the same in each rank's part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The buffer's number.
    pub buffer: u64,
    /// Bytes from its beginning.
    pub offset: u64,
}

/// A part of this rank's arena. Dropping it frees it.
pub struct ShmRegion {
    group: Arc<ShmGroup>,
    range: Range<usize>,
    len: usize,
}

impl ShmRegion {
    /// `len` zero bytes of this rank's arena.
    ///
    /// # Errors
    /// [`Error::Io`] if the host is short of memory or the arena of room.
    pub fn new(group: Arc<ShmGroup>, len: usize) -> Result<ShmRegion> {
        let failed =
            |error| Error::io(format!("cannot share {len} bytes of memory with the ranks of this host"), error);
        let room = group.segment().arena_bytes();
        let range = group.regions.lock().take(len, room).ok_or_else(|| failed(rustix::io::Errno::NOMEM))?;
        let region = ShmRegion { group, range, len };
        region.group.segment().populate(region.group.rank(), &region.range).map_err(failed)?;
        Ok(region)
    }

    /// Where it begins in this rank's arena, in bytes.
    pub fn start(&self) -> usize {
        self.range.start
    }

    /// Makes the region this rank's part of buffer `number`, of which `starts` gives the beginning on each rank. From now on
    /// operations recognise memory in it. Gives that memory, which keeps the region.
    ///
    /// # Errors
    /// [`Error::Protocol`] if a rank's part lies outside of its arena.
    pub fn bind(self, number: u64, starts: Vec<usize>) -> Result<Memory> {
        let (segment, len) = (self.group.segment(), self.len);
        for (rank, &start) in starts.iter().enumerate() {
            if start.checked_add(self.range.len()).is_none_or(|end| end > segment.arena_bytes()) {
                let detail = format!("its part of a shared buffer begins at {start}, outside of its arena");
                return Err(Error::Protocol { peer: format!("rank {rank}"), detail });
            }
            // Each page that is missing now would be a fault in the first reduction.
            let _ = segment.populate(rank, &(start..start + self.range.len()));
        }
        let at = segment.region(self.group.rank(), &self.range);
        self.group.regions.lock().buffers.insert(self.range.start, Buffer { number, len, starts });
        let Some(at) = std::ptr::NonNull::new(at) else { return Ok(Memory::empty()) };
        // SAFETY: the region is this rank's until it is dropped, which the owner is only with the last clone.
        Ok(unsafe { Memory::from_raw_parts(at, len, Some(Arc::new(self))) })
    }
}

impl Drop for ShmRegion {
    fn drop(&mut self) {
        let mut regions = self.group.regions.lock();
        regions.buffers.remove(&self.range.start);
        // The pages first, as the next to get this range expects zeros.
        if let Err(error) = self.group.segment().punch(self.group.rank(), &self.range) {
            tracing::warn!(%error, "{} bytes of shared memory stay in use", self.range.len());
            return;
        }
        regions.taken.remove(&self.range.start);
    }
}

impl Regions {
    /// The first gap of an arena of `room` bytes in which `len` fit.
    fn take(&mut self, len: usize, room: usize) -> Option<Range<usize>> {
        let align = if len >= LARGE_PAGE { LARGE_PAGE } else { PAGE };
        let len = len.max(1).checked_next_multiple_of(PAGE)?;
        let mut start = 0usize;
        for (&from, &to) in &self.taken {
            if start.checked_add(len)? <= from {
                break;
            }
            start = to.checked_next_multiple_of(align)?;
        }
        let end = start.checked_add(len).filter(|&end| end <= room)?;
        self.taken.insert(start, end);
        Some(start..end)
    }

    fn find(&self, range: &Range<usize>) -> Option<(usize, &Buffer)> {
        let (&start, buffer) = self.buffers.range(..=range.start).next_back()?;
        (range.end <= start + buffer.len).then_some((range.start - start, buffer))
    }
}

impl ShmGroup {
    /// The place of `memory`, if all of it lies in one buffer.
    pub fn place(&self, memory: &Memory) -> Option<Place> {
        let range = self.within_arena(memory)?;
        let regions = self.regions.lock();
        let (offset, buffer) = regions.find(&range)?;
        Some(Place { buffer: buffer.number, offset: offset as u64 })
    }

    /// Where in each rank's arena the bytes are that correspond to `memory`, which has a place.
    pub(super) fn starts(&self, memory: &Memory) -> Option<Vec<usize>> {
        let range = self.within_arena(memory)?;
        let regions = self.regions.lock();
        let (offset, buffer) = regions.find(&range)?;
        Some(buffer.starts.iter().map(|start| start + offset).collect())
    }

    /// The bytes of this rank's arena that are `memory`.
    fn within_arena(&self, memory: &Memory) -> Option<Range<usize>> {
        let room = self.segment().arena_bytes();
        let start = (memory.as_ptr() as usize).checked_sub(self.segment().region(self.rank(), &(0..0)) as usize)?;
        let end = start.checked_add(memory.len())?;
        (end <= room && !memory.is_empty()).then_some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_fill_gaps_and_never_overlap() {
        let mut regions = Regions::default();
        let room = 16 * PAGE;
        assert_eq!(regions.take(1, room), Some(0..PAGE));
        assert_eq!(regions.take(PAGE + 1, room), Some(PAGE..3 * PAGE));
        assert_eq!(regions.take(PAGE, room), Some(3 * PAGE..4 * PAGE));
        regions.taken.remove(&PAGE);
        assert_eq!(regions.take(3 * PAGE, room), Some(4 * PAGE..7 * PAGE));
        assert_eq!(regions.take(2 * PAGE, room), Some(PAGE..3 * PAGE));
        assert_eq!(regions.take(10 * PAGE, room), None);
        assert_eq!(regions.take(usize::MAX, room), None);
        assert_eq!(regions.take(9 * PAGE, room), Some(7 * PAGE..16 * PAGE));
    }
}
