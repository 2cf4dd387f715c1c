//! Sleeping beside MPI, which can only be polled.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use crate::transport::Waiter;

/// So many waits give the core away only for a moment.
const YIELDS: u32 = 50;

/// So many more are short sleeps; the rest are as long as [`LONG`].
const SHORT_SLEEPS: u32 = 100;

const SHORT: Duration = Duration::from_micros(50);

const LONG: Duration = Duration::from_millis(1);

/// While MPI has nothing under way, the mesh wakes us; else the sleeps are short and become longer.
pub(super) struct MpiWaiter {
    mesh: Arc<dyn Waiter>,
    /// Number of MPI's operations under way.
    pub(super) outstanding: AtomicUsize,
    /// Waits since anything moved.
    pub(super) idle: AtomicU32,
}

impl MpiWaiter {
    pub(super) fn new(mesh: Arc<dyn Waiter>) -> Self {
        MpiWaiter { mesh, outstanding: AtomicUsize::new(0), idle: AtomicU32::new(0) }
    }
}

impl Waiter for MpiWaiter {
    fn wait(&self, timeout: Option<Duration>) {
        if self.outstanding.load(Ordering::Acquire) == 0 {
            return self.mesh.wait(timeout);
        }
        let limit = timeout.unwrap_or(LONG);
        match self.idle.fetch_add(1, Ordering::Relaxed) {
            0..YIELDS => std::thread::yield_now(),
            YIELDS..SHORT_SLEEPS => std::thread::sleep(SHORT.min(limit)),
            _ => self.mesh.wait(Some(LONG.min(limit))),
        }
    }

    fn wake(&self) {
        self.mesh.wake();
    }
}
