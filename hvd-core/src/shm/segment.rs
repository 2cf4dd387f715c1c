//! The memory file: its layout, its making and its mapping.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// How many pieces are in flight at most: each rank has this many slots.
pub const PIECES: usize = 4;

/// How many counters a rank has.
pub(super) const PHASES: usize = 4;

/// Bytes of a control page, of a page of the board, and of the head page that carries the nonce.
pub(super) const PAGE: usize = 4096;
/// What a rank says in a round is read by others while it speaks in the next.
const PAGES_PER_BOARD: usize = 2;
/// Slots begin at a multiple of this, for the vector units.
const ALIGN: usize = 64;
/// Added between slots, so that equal offsets of two slots do not compete for the same cache sets and store buffers.
const SKEW: usize = 1088;
/// Bounds on what a peer may propose.
const MAX_SLOT_BYTES: usize = 64 << 20;
const MAX_RANKS: usize = 4096;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Identifies the segment of one group: known to the members only.
pub(super) type Nonce = [u8; 16];

/// A value with cache lines of its own (two, as the prefetcher fetches pairs).
#[repr(C, align(128))]
pub(super) struct Padded<T>(pub T);

/// What a rank tells the others. Written by its rank, except that a peer takes `sleeping` back when it rings.
#[repr(C)]
pub(super) struct Control {
    /// How many pieces have been staged, reduced, copied out, and in how many rounds the rank has spoken.
    pub counters: [Padded<AtomicU64>; PHASES],
    /// 1 while the rank sleeps or is about to.
    pub sleeping: Padded<AtomicU32>,
    /// What it sleeps for: any one of these.
    pub needs: [NeedCell; PHASES],
}

/// A condition that a sleeping rank waits for, as its peers read it.
#[repr(C)]
pub(super) struct NeedCell {
    /// The counter must have reached this.
    pub count: AtomicU64,
    /// Which counter.
    pub counter: AtomicU32,
    /// Whose: a rank, [`NeedCell::ALL`] or [`NeedCell::ANY`].
    pub by: AtomicU32,
}

impl NeedCell {
    /// Stands for every rank.
    pub const ALL: u32 = u32::MAX;
    /// Stands for whichever rank comes first.
    pub const ANY: u32 = u32::MAX - 1;
}

const _: () = assert!(size_of::<Control>() <= PAGE);

/// Where things are in a segment: a head page, a control page and the pages of the board per rank, then the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    ranks: usize,
    slot_bytes: usize,
}

impl Layout {
    /// `slot_bytes` is rounded up to whole cache lines. `None` for sizes out of bounds.
    pub fn new(ranks: usize, slot_bytes: usize) -> Option<Layout> {
        let slot_bytes = slot_bytes.max(1).checked_next_multiple_of(ALIGN)?;
        let layout = Layout { ranks, slot_bytes };
        let sane = slot_bytes <= MAX_SLOT_BYTES && (1..=MAX_RANKS).contains(&ranks);
        (sane && layout.total() <= isize::MAX as usize).then_some(layout)
    }

    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    fn stride(&self) -> usize {
        self.slot_bytes + SKEW
    }

    fn total(&self) -> usize {
        let slots = self.stride() * self.ranks * PIECES;
        self.pages() + slots.next_multiple_of(PAGE)
    }

    /// Bytes of all that comes before the slots.
    fn pages(&self) -> usize {
        PAGE * (1 + self.ranks * (1 + PAGES_PER_BOARD))
    }

    fn control(&self, rank: usize) -> usize {
        assert!(rank < self.ranks, "rank {rank} of {}", self.ranks);
        PAGE * (1 + rank)
    }

    fn board(&self, rank: usize, round: u64) -> usize {
        assert!(rank < self.ranks, "rank {rank} of {}", self.ranks);
        PAGE * (1 + self.ranks + PAGES_PER_BOARD * rank + (round % PAGES_PER_BOARD as u64) as usize)
    }

    fn slot(&self, rank: usize, piece: u64) -> usize {
        assert!(rank < self.ranks, "rank {rank} of {}", self.ranks);
        let index = (piece % PIECES as u64) as usize * self.ranks + rank;
        self.pages() + index * self.stride()
    }
}

/// Makes a zeroed, sealed memory file for `layout`, with the nonce in its head. All of its pages are allocated, so that
/// a host short of memory says so here rather than by a signal later.
pub(super) fn create(layout: Layout, nonce: &Nonce) -> rustix::io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("hvd", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let total = layout.total() as u64;
    rustix::fs::ftruncate(&file, total)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, total)?;
    rustix::fs::fcntl_add_seals(&file, SEALS)?;
    rustix::io::pwrite(&file, nonce, 0)?;
    Ok(file)
}

/// A mapped segment.
pub(super) struct Segment {
    layout: Layout,
    base: NonNull<u8>,
}

// SAFETY: the mapping is plain memory, valid on every thread until it is dropped; access to the slots is by unsafe
// functions whose callers keep the protocol, access to the control pages by atomics.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// Maps a file that a peer made or this rank did, after checking that it is what was announced: sealed, of the
    /// right size, and with the right nonce.
    pub fn map(file: BorrowedFd<'_>, layout: Layout, nonce: &Nonce) -> rustix::io::Result<Segment> {
        let sealed = rustix::fs::fcntl_get_seals(file)?.contains(SEALS);
        let size = rustix::fs::fstat(file)?.st_size;
        let mut head = Nonce::default();
        rustix::io::pread(file, &mut head, 0)?;
        if !sealed || size != layout.total() as i64 || head != *nonce {
            return Err(rustix::io::Errno::INVAL);
        }
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a fresh mapping at an address of the system's choice touches no other memory.
        let base = unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), layout.total(), protection, flags, file.as_fd(), 0)?
        };
        NonNull::new(base.cast()).map(|base| Segment { layout, base }).ok_or(rustix::io::Errno::NOMEM)
    }

    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.layout.slot_bytes()
    }

    /// The control page of a rank.
    pub fn control(&self, rank: usize) -> &Control {
        // SAFETY: the page lies within the mapping and is aligned to a page; every bit pattern is a valid Control, and
        // all of it is atomics.
        unsafe { self.base.add(self.layout.control(rank)).cast().as_ref() }
    }

    /// A rank's page of the board for a round. The next round has another, the one after it this one again.
    pub fn board(&self, rank: usize, round: u64) -> *mut [u8; PAGE] {
        // SAFETY: the page lies within the mapping.
        unsafe { self.base.add(self.layout.board(rank, round)).cast().as_ptr() }
    }

    /// Part of a rank's slot for a piece, to read.
    ///
    /// # Safety
    /// No rank that keeps the protocol may be writing these bytes while the slice is in use.
    pub unsafe fn read(&self, rank: usize, piece: u64, range: Range<usize>) -> &[u8] {
        let at = self.span(rank, piece, &range);
        // SAFETY: within the mapping by `span`; exclusion is the caller's duty.
        unsafe { std::slice::from_raw_parts(at, range.len()) }
    }

    /// Part of a rank's slot for a piece, to write.
    ///
    /// # Safety
    /// No rank that keeps the protocol may be reading or writing these bytes while the slice is in use.
    #[allow(clippy::mut_from_ref)] // The segment is shared by design; exclusion is the caller's duty.
    pub unsafe fn write(&self, rank: usize, piece: u64, range: Range<usize>) -> &mut [u8] {
        let at = self.span(rank, piece, &range);
        // SAFETY: within the mapping by `span`; exclusion is the caller's duty.
        unsafe { std::slice::from_raw_parts_mut(at, range.len()) }
    }

    fn span(&self, rank: usize, piece: u64, range: &Range<usize>) -> *mut u8 {
        let fits = range.start <= range.end && range.end <= self.slot_bytes();
        assert!(fits, "bytes {range:?} of a slot of {}", self.slot_bytes());
        // SAFETY: the slot lies within the mapping, and the range within the slot.
        unsafe { self.base.add(self.layout.slot(rank, piece) + range.start).as_ptr() }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let base = self.base.as_ptr().cast::<c_void>();
        // SAFETY: this is the mapping made in `map`; no reference into it outlives the segment.
        let _ = unsafe { rustix::mm::munmap(base, self.layout.total()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_lie_apart_and_within_the_file() {
        let layout = Layout::new(3, 100).unwrap();
        assert_eq!(layout.slot_bytes(), 128);
        let mut starts: Vec<_> =
            (0..PIECES as u64).flat_map(|piece| (0..3).map(move |rank| layout.slot(rank, piece))).collect();
        starts.sort_unstable();
        assert!(starts[0] >= PAGE * 10);
        let pages: std::collections::BTreeSet<_> = (0..3)
            .flat_map(|rank| [layout.control(rank), layout.board(rank, 0), layout.board(rank, 1)])
            .chain([0])
            .collect();
        assert_eq!(pages.len(), 10);
        assert!(pages.iter().all(|page| page % PAGE == 0 && page + PAGE <= starts[0]));
        assert_eq!(layout.board(1, 2), layout.board(1, 0));
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 128));
        assert!(starts.last().unwrap() + 128 <= layout.total());
        assert_eq!(layout.slot(1, 2), layout.slot(1, 2 + PIECES as u64));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert_eq!(Layout::new(2, usize::MAX), None);
        assert_eq!(Layout::new(2, MAX_SLOT_BYTES + 1), None);
        assert_eq!(Layout::new(0, 64), None);
        assert_eq!(Layout::new(MAX_RANKS + 1, 64), None);
    }

    #[test]
    fn a_file_that_is_not_as_announced_is_refused() {
        let layout = Layout::new(2, 4096).unwrap();
        let file = create(layout, &[7; 16]).unwrap();
        assert!(Segment::map(file.as_fd(), layout, &[7; 16]).is_ok());
        assert!(Segment::map(file.as_fd(), layout, &[8; 16]).is_err());
        assert!(Segment::map(file.as_fd(), Layout::new(2, 8192).unwrap(), &[7; 16]).is_err());
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
        let open = rustix::fs::memfd_create("open", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&open, layout.total() as u64).unwrap();
        assert!(Segment::map(open.as_fd(), layout, &[0; 16]).is_err());
    }

    #[test]
    #[should_panic(expected = "of a slot")]
    fn nothing_past_a_slot_is_given_out() {
        let layout = Layout::new(1, 64).unwrap();
        let file = create(layout, &[7; 16]).unwrap();
        let segment = Segment::map(file.as_fd(), layout, &[7; 16]).unwrap();
        // SAFETY: nobody else knows of the segment.
        unsafe { segment.read(0, 0, 0..65) };
    }
}
