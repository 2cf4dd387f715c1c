//! The memory file: its layout, its making and its mapping.
//!
//! Behind the slots lies an *arena* for each rank, address space as large as the host's memory: pages come with what
//! [`super::arena`] hands out, and go with it.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

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
/// Added between slots, and before the first: equal offsets of eight slots in a row, and of user memory, which tends to begin
/// near a page's beginning, then differ within a page by a multiple of this. Loads whose address agrees in its last 12 bits with
/// a store under way wait for it: 63 us instead of 24 for 256 KiB on a Zen 3.
const SKEW: usize = 512;
const FIRST: usize = SKEW * 5 / 8;
/// Bounds on what a peer may propose.
const MAX_SLOT_BYTES: usize = 64 << 20;
const MAX_RANKS: usize = 4096;
/// Bounds on all arenas together: address spaces have 47 bits.
const MAX_ARENAS_BYTES: usize = 1 << 45;
/// Arenas, and large regions in them, begin at a multiple of this, so that the system can use large pages.
pub(super) const LARGE_PAGE: usize = 2 << 20;

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

/// Where things are in a segment: a head page, a control page and the pages of the board per rank, the slots, then an
/// arena per rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    ranks: usize,
    slot_bytes: usize,
    arena_bytes: usize,
}

impl Layout {
    /// `slot_bytes` is rounded up to whole cache lines, `arena_bytes` down to large pages. `None` for sizes out of bounds.
    pub fn new(ranks: usize, slot_bytes: usize, arena_bytes: usize) -> Option<Layout> {
        let slot_bytes = slot_bytes.max(1).checked_next_multiple_of(ALIGN)?;
        let arena_bytes = arena_bytes / LARGE_PAGE * LARGE_PAGE;
        let layout = Layout { ranks, slot_bytes, arena_bytes };
        let arenas = arena_bytes.checked_mul(ranks)?;
        let sane = slot_bytes <= MAX_SLOT_BYTES && (1..=MAX_RANKS).contains(&ranks) && arenas <= MAX_ARENAS_BYTES;
        (sane && layout.total() <= isize::MAX as usize).then_some(layout)
    }

    /// As [`Layout::new`], with arenas as large as this host's memory, or as addresses allow.
    pub fn for_this_host(ranks: usize, slot_bytes: usize) -> Option<Layout> {
        let system = rustix::system::sysinfo();
        let memory = (system.totalram as usize).saturating_mul(system.mem_unit as usize);
        Layout::new(ranks, slot_bytes, memory.min(MAX_ARENAS_BYTES / ranks.max(1)))
    }

    /// Bytes of each rank's arena.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    fn stride(&self) -> usize {
        self.slot_bytes + SKEW
    }

    fn total(&self) -> usize {
        self.arenas() + self.arena_bytes * self.ranks
    }

    /// Where the arenas begin, and all that is there from the start ends.
    fn arenas(&self) -> usize {
        (self.pages() + FIRST + self.stride() * self.ranks * PIECES).next_multiple_of(LARGE_PAGE)
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
        self.pages() + FIRST + index * self.stride()
    }
}

/// Makes a zeroed, sealed memory file for `layout`, with the nonce in its head. All pages but the arenas' are allocated, so
/// that a host short of memory says so here rather than by a signal later.
pub(super) fn create(layout: Layout, nonce: &Nonce) -> rustix::io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("hvd", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, layout.total() as u64)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, layout.arenas() as u64)?;
    rustix::fs::fcntl_add_seals(&file, SEALS)?;
    rustix::io::pwrite(&file, nonce, 0)?;
    Ok(file)
}

/// A mapped segment.
pub(super) struct Segment {
    layout: Layout,
    /// All but the arenas.
    base: Mapping,
    arenas: Option<Mapping>,
    file: OwnedFd,
}

/// Part of the file in this process's memory.
struct Mapping {
    at: NonNull<u8>,
    len: usize,
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
        let file = file.try_clone_to_owned().map_err(|_| rustix::io::Errno::MFILE)?;
        let (arenas, total) = (layout.arenas(), layout.total());
        let base = Mapping::new(&file, 0..arenas, MapFlags::SHARED | MapFlags::POPULATE)?;
        let arenas = match arenas < total {
            true => Some(Mapping::new(&file, arenas..total, MapFlags::SHARED | MapFlags::NORESERVE)?),
            false => None,
        };
        if let Some(Mapping { at, len }) = &arenas {
            // SAFETY: the mapping was made above; the advice changes no content. It is but advice, so it may fail.
            let _ = unsafe { rustix::mm::madvise(at.as_ptr().cast(), *len, Advice::LinuxHugepage) };
        }
        Ok(Segment { layout, base, arenas, file })
    }

    /// Bytes of each rank's arena.
    pub fn arena_bytes(&self) -> usize {
        self.layout.arena_bytes()
    }

    /// Where part of a rank's arena is mapped.
    pub fn region(&self, rank: usize, range: &Range<usize>) -> *mut u8 {
        let fits = rank < self.layout.ranks && range.start <= range.end && range.end <= self.arena_bytes();
        assert!(fits, "bytes {range:?} of the arena of rank {rank}");
        let Some(arenas) = &self.arenas else { return NonNull::dangling().as_ptr() };
        // SAFETY: the region lies within the mapping.
        unsafe { arenas.at.add(rank * self.arena_bytes() + range.start).as_ptr() }
    }

    /// Gives part of a rank's arena its pages, zeroed, and maps them, so that nothing is missing later.
    pub fn populate(&self, rank: usize, range: &Range<usize>) -> rustix::io::Result<()> {
        let at = self.region(rank, range).cast();
        // SAFETY: the range lies within the mapping; no content changes.
        match unsafe { rustix::mm::madvise(at, range.len(), Advice::LinuxPopulateWrite) } {
            // Before Linux 5.14.
            Err(rustix::io::Errno::INVAL) => {
                let (start, len) = self.file_range(rank, range);
                rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, start, len)
            }
            other => other,
        }
    }

    /// Takes the pages of part of a rank's arena away; read again, it is zero.
    pub fn punch(&self, rank: usize, range: &Range<usize>) -> rustix::io::Result<()> {
        let (start, len) = self.file_range(rank, range);
        rustix::fs::fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, len)
    }

    fn file_range(&self, rank: usize, range: &Range<usize>) -> (u64, u64) {
        let start = self.layout.arenas() + rank * self.arena_bytes() + range.start;
        (start as u64, range.len() as u64)
    }

    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.layout.slot_bytes()
    }

    /// The control page of a rank.
    pub fn control(&self, rank: usize) -> &Control {
        // SAFETY: the page lies within the mapping and is aligned to a page; every bit pattern is a valid Control, and
        // all of it is atomics.
        unsafe { self.base.at.add(self.layout.control(rank)).cast().as_ref() }
    }

    /// A rank's page of the board for a round. The next round has another, the one after it this one again.
    pub fn board(&self, rank: usize, round: u64) -> *mut [u8; PAGE] {
        // SAFETY: the page lies within the mapping.
        unsafe { self.base.at.add(self.layout.board(rank, round)).cast().as_ptr() }
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
        unsafe { self.base.at.add(self.layout.slot(rank, piece) + range.start).as_ptr() }
    }
}

impl Mapping {
    fn new(file: &OwnedFd, range: Range<usize>, flags: MapFlags) -> rustix::io::Result<Mapping> {
        let (len, protection) = (range.len(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a fresh mapping at an address of the system's choice touches no other memory.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, range.start as u64)? };
        NonNull::new(at.cast()).map(|at| Mapping { at, len }).ok_or(rustix::io::Errno::NOMEM)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`; no reference into it outlives the segment.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast::<c_void>(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn slots_lie_apart_and_within_the_file() {
        let layout = Layout::new(3, 100, LARGE_PAGE).unwrap();
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
        assert!(starts.last().unwrap() + 128 <= layout.arenas());
        assert_eq!(layout.total(), layout.arenas() + 3 * LARGE_PAGE);
        assert_eq!(layout.slot(1, 2), layout.slot(1, 2 + PIECES as u64));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert_eq!(Layout::new(2, usize::MAX, 0), None);
        assert_eq!(Layout::new(2, MAX_SLOT_BYTES + 1, 0), None);
        assert_eq!(Layout::new(0, 64, 0), None);
        assert_eq!(Layout::new(MAX_RANKS + 1, 64, 0), None);
        assert_eq!(Layout::new(2, 64, MAX_ARENAS_BYTES), None);
        assert_eq!(Layout::new(2, 64, usize::MAX), None);
        assert!(Layout::for_this_host(2, 64).is_some_and(|layout| layout.arena_bytes() > 0));
    }

    #[test]
    fn a_file_that_is_not_as_announced_is_refused() {
        let layout = Layout::new(2, 4096, 4 << 20).unwrap();
        let file = create(layout, &[7; 16]).unwrap();
        assert!(Segment::map(file.as_fd(), layout, &[7; 16]).is_ok());
        assert!(Segment::map(file.as_fd(), layout, &[8; 16]).is_err());
        assert!(Segment::map(file.as_fd(), Layout::new(2, 1 << 20, 4 << 20).unwrap(), &[7; 16]).is_err());
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
        let open = rustix::fs::memfd_create("open", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&open, layout.total() as u64).unwrap();
        assert!(Segment::map(open.as_fd(), layout, &[0; 16]).is_err());
    }

    #[test]
    #[should_panic(expected = "of a slot")]
    fn nothing_past_a_slot_is_given_out() {
        let layout = Layout::new(1, 64, 0).unwrap();
        let file = create(layout, &[7; 16]).unwrap();
        let segment = Segment::map(file.as_fd(), layout, &[7; 16]).unwrap();
        // SAFETY: nobody else knows of the segment.
        unsafe { segment.read(0, 0, 0..65) };
    }
}
