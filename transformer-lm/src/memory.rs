//! The process's memory: how much there is, and the allocator's settings for loops that make and drop the same large tensors
//! over and over.

use crate::{Error, Result};

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

/// Asks the system to move what is read over and over into large pages; whether it did. Reading from small ones is slower, as the processor has
/// to look up each page's address. It takes as long as it takes to copy the elements.
///
/// Only Linux 6.1 and later do so. Less than a large page is left where it is.
pub fn use_large_pages<T>(elements: &[T]) -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const LARGE: usize = 2 << 20;
        let bytes = elements.as_ptr().cast::<u8>();
        let before = bytes.align_offset(LARGE).min(size_of_val(elements));
        let whole = (size_of_val(elements) - before) / LARGE * LARGE;
        let first = bytes.wrapping_add(before).cast_mut().cast();
        // SAFETY: whole pages of memory that is borrowed; the bytes stay what they are.
        whole > 0 && unsafe { libc::madvise(first, whole, libc::MADV_COLLAPSE) } == 0
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    {
        let _ = elements;
        false
    }
}

/// Bytes of memory that this host has, or that this process's container may use; none where the system does not tell.
pub fn host_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX);
    Some(limit.min(kib << 10))
}

/// Refuses a model whose weights take `bytes`, more than this host has: to try would end in the system killing some process.
///
/// # Errors
/// [`Error::Config`] with both figures.
pub fn check_room(bytes: usize) -> Result<()> {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    match host_bytes().filter(|there| bytes as u64 > *there) {
        None => Ok(()),
        Some(there) => Err(Error::Config(format!(
            "the model's weights alone need {:.1} GiB of memory, and this host has {:.1} GiB\n\
             hint: make model.d_model, model.d_ff, model.n_layers or model.vocab_size smaller",
            gib(bytes as u64),
            gib(there)
        ))),
    }
}

/// Bytes of memory that this process holds now; none where the system does not tell.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// The most bytes of memory that this process has held; none where the system does not tell.
pub fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_stay_what_they_are_in_large_pages() {
        let block: Vec<u32> = (0..3 << 20).collect();
        println!("large pages: {}", use_large_pages(&block));
        assert!(block.iter().copied().eq(0..3 << 20));
        assert!(!use_large_pages(&block[..1000]) && !use_large_pages::<u32>(&[]));
    }

    #[test]
    fn memory_that_is_used_is_seen() {
        let before = resident_bytes().unwrap();
        // Straight from the system, which an allocator need not ask; and more than other tests free meanwhile.
        let mut block = memmap2::MmapMut::map_anon(256 << 20).unwrap();
        block.fill(1);
        let held = resident_bytes().unwrap();
        assert!(held >= before + (128 << 20), "{before} {held}");
        assert!(peak_resident_bytes().unwrap() >= held);
        drop(block);
    }
}
