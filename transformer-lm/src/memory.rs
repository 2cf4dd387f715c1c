//! The allocator's settings for loops that make and drop the same large tensors over and over.

/// Tells the C library's allocator to keep memory that was freed.
///
/// By default glibc maps each large tensor afresh and hands it back when it is dropped, so that every step of a training
/// loop pays for the same page faults again. Call it once, before the loop; the process then stays as large as it was at
/// its peak. With another C library it does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let settings = [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_TOP_PAD, 64 << 20)];
        for (name, value) in settings {
            // SAFETY: mallopt takes two numbers, may be called at any time, and ignores what it does not know.
            unsafe { libc::mallopt(name, value) };
        }
    }
}
