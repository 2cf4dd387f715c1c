//! Asking for memory before it is read. The processor does so by itself where one address follows another; not from row to row, and not far
//! enough ahead of loops that compute much for each byte.

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Asks for the lines that hold so many elements from a place on, which need not exist.
#[inline(always)]
pub(crate) fn fetch<T>(place: *const T, elements: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        for line in (0..elements * size_of::<T>()).step_by(LINE) {
            // SAFETY: the instruction, which every processor of this architecture has, only advises, wherever that is.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast::<i8>().wrapping_add(line)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (place, elements);
}
