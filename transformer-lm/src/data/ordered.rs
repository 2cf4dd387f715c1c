//! Work on several threads whose results come in the order of the work.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// What `work` makes of each item, in the order of the items. Memory is bounded: threads wait when `ahead` results have not
/// been taken. Dropping it ends the threads.
#[derive(Debug)]
pub(super) struct Ordered<R> {
    /// A place for each item that was begun; none while dropping.
    results: Option<Receiver<Receiver<R>>>,
    threads: Vec<JoinHandle<()>>,
}

impl<R: Send + 'static> Ordered<R> {
    /// Starts `threads` threads, at least one.
    pub(super) fn new<T: Send + 'static>(
        threads: usize,
        ahead: usize,
        items: impl Iterator<Item = T> + Send + 'static,
        work: impl Fn(T) -> R + Send + Sync + 'static,
    ) -> Self {
        let (queue, results) = sync_channel(ahead);
        let (items, work) = (Arc::new(Mutex::new(items)), Arc::new(work));
        let worker = |_| {
            let (items, work, queue) = (Arc::clone(&items), Arc::clone(&work), queue.clone());
            std::thread::spawn(move || {
                while let Some((item, answer)) = take(&items, &queue) {
                    if answer.send(work(item)).is_err() {
                        return;
                    }
                }
            })
        };
        Self { threads: (0..threads.max(1)).map(worker).collect(), results: Some(results) }
    }
}

/// The next item, and where its result goes. The place in the queue is taken under the lock, so places are in order; none
/// when the items are at their end, nobody wants results any more, or another thread has panicked.
fn take<T, R>(items: &Mutex<impl Iterator<Item = T>>, queue: &SyncSender<Receiver<R>>) -> Option<(T, Sender<R>)> {
    let mut items = items.lock().ok()?;
    let item = items.next()?;
    let (answer, result) = channel();
    queue.send(result).ok()?;
    Some((item, answer))
}

impl<R> Iterator for Ordered<R> {
    type Item = R;

    fn next(&mut self) -> Option<R> {
        if let Some(result) = self.results.as_ref()?.recv().ok().and_then(|result| result.recv().ok()) {
            return Some(result);
        }
        // The end, or a panic, which goes on here.
        self.results = None;
        for thread in self.threads.drain(..) {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
        None
    }
}

impl<R> Drop for Ordered<R> {
    fn drop(&mut self) {
        self.results = None;
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items() {
        for threads in [0, 1, 3, 8] {
            let slow_first = |i: u64| {
                if i.is_multiple_of(7) {
                    std::thread::yield_now();
                }
                i * i
            };
            let results: Vec<u64> = Ordered::new(threads, 2, 0..1000, slow_first).collect();
            assert_eq!(results, (0..1000).map(|i| i * i).collect::<Vec<_>>());
        }
    }

    #[test]
    fn nobody_runs_far_ahead_and_dropping_ends_an_endless_work() {
        let begun = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&begun);
        let mut ordered = Ordered::new(3, 2, 0.., move |i: u64| {
            count.fetch_add(1, Ordering::Relaxed);
            i
        });
        assert_eq!(ordered.by_ref().take(100).last(), Some(99));
        drop(ordered);
        // The queue, one more in the hand of each thread, and those that were taken.
        assert!(begun.load(Ordering::Relaxed) <= 100 + 2 + 3 + 1);
    }

    #[test]
    #[should_panic(expected = "number 5")]
    fn a_panic_is_not_taken_for_the_end() {
        Ordered::new(2, 4, 0..100, |i: u64| assert!(i != 5, "number {i}")).for_each(drop);
    }
}
