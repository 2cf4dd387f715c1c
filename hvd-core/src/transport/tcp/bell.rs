//! Sleeping until a socket is ready or somebody wakes us.
//!
//! Readiness is level-triggered, so that it is nobody's to lose: any number of threads may sleep here while another
//! drives the transport, and each is woken while something is left to do.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::transport::Waiter;

/// The key of the wake-up among the sockets' keys, which are ranks.
const WAKE: u64 = u64::MAX;

/// Most events that one look takes in; the rest is seen by the next.
const EVENTS: usize = 64;

/// An epoll set over the sockets, and an eventfd for wake-ups.
pub(crate) struct Bell {
    epoll: OwnedFd,
    wake: OwnedFd,
}

/// A socket that can be read or written, or has failed (then it counts as both).
pub(super) struct Ready {
    pub(super) peer: usize,
    pub(super) readable: bool,
    pub(super) writable: bool,
}

impl Bell {
    pub(crate) fn new() -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::io("creating an epoll set", e))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("creating an eventfd", e))?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)
            .map_err(|e| Error::io("watching an eventfd", e))?;
        Ok(Bell { epoll, wake })
    }

    /// Watches a peer's socket for bytes to read.
    pub(super) fn add(&self, peer: usize, socket: impl AsFd) -> Result<()> {
        epoll::add(&self.epoll, socket, EventData::new_u64(peer as u64), EventFlags::IN)
            .map_err(|e| Error::io("watching a socket", e))
    }

    /// Watches a peer's socket also for room to write, or no longer.
    pub(super) fn watch_writable(&self, peer: usize, socket: impl AsFd, on: bool) -> Result<()> {
        let flags = if on { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        epoll::modify(&self.epoll, socket, EventData::new_u64(peer as u64), flags)
            .map_err(|e| Error::io("watching a socket", e))
    }

    /// Watches no longer; the socket may be closed already.
    pub(super) fn remove(&self, socket: impl AsFd) {
        let _ = epoll::delete(&self.epoll, socket);
    }

    /// Which sockets are ready now.
    pub(super) fn ready(&self) -> Result<Vec<Ready>> {
        Ok(self.look(Some(Duration::ZERO))?.iter().filter_map(Ready::from_event).collect())
    }

    fn look(&self, timeout: Option<Duration>) -> Result<Vec<epoll::Event>> {
        let timeout = timeout.map(to_timespec);
        let mut events = Vec::with_capacity(EVENTS);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(events),
            Err(error) => Err(Error::io("waiting for sockets", error)),
        }
    }
}

impl Ready {
    fn from_event(event: &epoll::Event) -> Option<Self> {
        let (key, flags) = (event.data.u64(), event.flags);
        let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        (key != WAKE).then(|| Ready {
            peer: key as usize,
            readable: failed || flags.contains(EventFlags::IN),
            writable: failed || flags.contains(EventFlags::OUT),
        })
    }
}

impl Waiter for Bell {
    fn wait(&self, timeout: Option<Duration>) {
        // An error cannot be reported here; progress meets it again.
        let events = self.look(timeout).unwrap_or_default();
        if events.iter().any(|event| event.data.u64() == WAKE) {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
    }

    fn wake(&self) {
        // Fails only where the counter is full, and then a wake-up is pending anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// A duration as the kernel wants it, in whole milliseconds, rounded up.
pub(super) fn to_timespec(duration: Duration) -> Timespec {
    let millis = duration.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i64;
    Timespec { tv_sec: millis / 1000, tv_nsec: (millis % 1000 * 1_000_000) as _ }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_before_the_sleep_is_not_lost() {
        let bell = Bell::new().unwrap();
        bell.wake();
        bell.wake();
        bell.wait(None);
        bell.wait(Some(Duration::from_micros(1)));
    }
}
