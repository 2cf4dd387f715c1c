//! How a thread that waits for other ranks behaves before it sleeps.

use std::time::{Duration, Instant};

/// How many times as long a thread looks where it gives its processor away in between: that costs others little, and a sleep
/// costs two switches of threads and several system calls on either side.
const CROWDED_TIMES: u32 = 10;

/// For how long a waiting thread looks again before it sleeps, and what it does in between.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    limit: Duration,
    /// Whether those whom it waits for may need its processor.
    crowded: bool,
}

impl Patience {
    /// Spins for a time: there is a processor for each rank.
    pub(crate) fn alone(spin: Duration) -> Self {
        Patience { limit: spin, crowded: false }
    }

    /// Lets others run between two looks: there are more ranks than processors.
    pub(crate) fn crowded(spin: Duration) -> Self {
        Patience { limit: spin.saturating_mul(CROWDED_TIMES), crowded: true }
    }

    /// A part of it.
    pub(super) fn shortened(self, divisor: u32) -> Self {
        Patience { limit: self.limit / divisor, ..self }
    }

    /// Whether nothing has moved for so long that it is time to sleep.
    pub(super) fn is_over(&self, still_since: Instant) -> bool {
        still_since.elapsed() >= self.limit
    }

    /// A moment between two looks.
    pub(super) fn pause(&self) {
        match self.crowded {
            true => std::thread::yield_now(),
            false => std::hint::spin_loop(),
        }
    }
}
