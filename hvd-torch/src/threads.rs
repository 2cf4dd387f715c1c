//! The threads that torch computes with.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Result;
use crate::shim;

/// Sets the number of threads that torch computes with.
///
/// Where ranks fill the cores, one thread each is right: with more runnable threads than cores, OpenMP's spinning makes
/// everything several times slower.
pub fn set_num_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
}

/// The number of threads that torch computes with.
pub fn num_threads() -> usize {
    tch::get_num_threads().max(1) as usize
}

/// Runs `body` for ranges that cover `0..count`, of at least `grain` each (but the last), on the threads that torch computes with.
///
/// # Errors
/// If `body` panics, which is caught; the other ranges are served all the same.
pub fn parallel_for(count: usize, grain: usize, body: &(dyn Fn(Range<usize>) + Sync)) -> Result<()> {
    shim::parallel_for(count, grain, body)
}

/// The tasks of a loop, of which each thread takes the next when it is done with one.
#[derive(Debug)]
pub struct Tasks<'a> {
    next: &'a AtomicUsize,
    count: usize,
}

impl Iterator for Tasks<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let task = self.next.fetch_add(1, Ordering::Relaxed);
        (task < self.count).then_some(task)
    }
}

/// Serves the tasks `0..count`, each once, on the threads that torch computes with: whichever of them is slower, or has something else to
/// do, takes fewer. `body` runs once on each thread that takes part, and should take tasks until there are none.
///
/// # Errors
/// If `body` panics, which is caught. The task that it was at is lost, and those that no other thread was there to take.
pub fn share_tasks(count: usize, body: &(dyn Fn(Tasks) + Sync)) -> Result<()> {
    let next = AtomicUsize::new(0);
    parallel_for(num_threads().min(count), 1, &|range| range.for_each(|_| body(Tasks { next: &next, count })))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_loop_runs_on_as_many_threads_as_torch_has() {
        set_num_threads(2);
        let parts = Mutex::new(Vec::new());
        parallel_for(10, 1, &|range| parts.lock().unwrap().push((range, std::thread::current().id()))).unwrap();
        let mut parts = parts.into_inner().unwrap();
        parts.sort_by_key(|(range, _)| range.start);
        let [(first, one), (second, other)] = &parts[..] else { panic!("{parts:?}") };
        assert_eq!((first, second), (&(0..5), &(5..10)));
        assert_ne!(one, other);
    }

    #[test]
    fn each_task_is_served_once() {
        set_num_threads(2);
        for count in [0, 1, 2, 50] {
            let served = Mutex::new(Vec::new());
            share_tasks(count, &|tasks| tasks.for_each(|task| served.lock().unwrap().push(task))).unwrap();
            let mut served = served.into_inner().unwrap();
            served.sort_unstable();
            assert_eq!(served, (0..count).collect::<Vec<_>>());
        }
    }
}
