//! Heartbeats: a process that is stopped, or a host that is cut off, keeps its connections and says nothing.
//!
//! The ranks form a ring, and each sends a beat to both of its neighbours, over connections of their own and from a
//! thread of its own: whatever the caller and the engine are busy with, a rank that lives is heard. That is enough for any
//! number of ranks: of those that are silent at least one has a living neighbour, which tells all others by failing.
//! A rank that was itself held up (stopped, or its machine paused) cannot judge the others by the clock, and waits for
//! another full timeout.

use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::bell::{Bell, to_timespec};
use crate::error::{Error, Result};
use crate::transport::Waiter;

/// Beats within one timeout: so many can be late or lost.
const BEATS_PER_TIMEOUT: u32 = 6;

/// The ranks that `rank` sends beats to and hears them from.
pub(super) fn neighbours(rank: usize, size: usize) -> Vec<usize> {
    let mut both = vec![(rank + 1) % size, (rank + size - 1) % size];
    both.dedup();
    both.retain(|&neighbour| neighbour != rank);
    both
}

/// The thread that beats and listens, for one world. Dropping it ends the thread.
pub(super) struct Heartbeat {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread shares with the transport.
struct Shared {
    timeout: Duration,
    /// Wakes who sleeps on the transport.
    bell: Arc<Bell>,
    /// Wakes the thread.
    nudge: OwnedFd,
    findings: Mutex<Findings>,
    /// Whether the findings are worth a look.
    alarm: AtomicBool,
}

/// What the thread has found, and what it is told.
#[derive(Default)]
struct Findings {
    silent: Vec<usize>,
    /// Since when goodbyes are waited for: this rank has said its own.
    farewell_since: Option<Instant>,
    /// How many timeouts they have taken.
    farewell_timeouts: u32,
    stop: bool,
}

impl Heartbeat {
    /// Begins to beat to, and to listen for, the ranks at the other ends of `connections`.
    pub(super) fn start(connections: Vec<(usize, TcpStream)>, timeout: Duration, bell: Arc<Bell>) -> Result<Self> {
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("creating an eventfd", error))?;
        let shared =
            Arc::new(Shared { timeout, bell, nudge, findings: Mutex::default(), alarm: AtomicBool::new(false) });
        let neighbours = connections.into_iter().map(Neighbour::new).collect::<Result<Vec<_>>>()?;
        let listener = Listener { shared: shared.clone(), neighbours, interval: timeout / BEATS_PER_TIMEOUT };
        let thread = std::thread::Builder::new().name("hvd-heartbeat".into()).spawn(move || listener.run());
        let thread = thread.map_err(|error| Error::io("starting the heartbeat's thread", error))?;
        Ok(Heartbeat { shared, thread: Some(thread) })
    }

    /// How long a rank may be silent.
    pub(super) fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    /// The neighbours that were silent for too long. Costs one load where there are none.
    pub(super) fn silent(&self) -> Vec<usize> {
        match self.shared.alarm.load(Ordering::Acquire) {
            true => self.shared.findings.lock().silent.clone(),
            false => Vec::new(),
        }
    }

    /// This rank has said goodbye: the others, who agreed to, have to do so within the timeout.
    pub(super) fn expect_farewell(&self) {
        self.shared.findings.lock().farewell_since = Some(Instant::now());
        self.shared.nudge();
    }

    /// How many timeouts have passed since then.
    pub(super) fn farewell_timeouts(&self) -> u32 {
        match self.shared.alarm.load(Ordering::Acquire) {
            true => self.shared.findings.lock().farewell_timeouts,
            false => 0,
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.findings.lock().stop = true;
        self.shared.nudge();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Shared {
    fn nudge(&self) {
        // Fails only where the counter is full, and then a nudge is pending anyway.
        let _ = rustix::io::write(&self.nudge, &1u64.to_ne_bytes());
    }

    fn raise_alarm(&self) {
        self.alarm.store(true, Ordering::Release);
        self.bell.wake();
    }
}

/// A rank that is listened to.
struct Neighbour {
    rank: usize,
    stream: TcpStream,
    heard: Instant,
    /// The connection has ended; how, the mesh finds out.
    gone: bool,
}

impl Neighbour {
    fn new((rank, stream): (usize, TcpStream)) -> Result<Self> {
        let prepared = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
        prepared.map_err(|error| Error::io(format!("preparing the heartbeat's socket to rank {rank}"), error))?;
        Ok(Neighbour { rank, stream, heard: Instant::now(), gone: false })
    }

    fn beat(&self) {
        // A full buffer means that many beats are on their way; a broken connection is the mesh's to report.
        let _ = rustix::net::send(&self.stream, &[1], SendFlags::NOSIGNAL);
    }

    /// Takes in the beats that have come.
    fn listen(&mut self, now: Instant) {
        let mut beats = [0; 64];
        match rustix::net::recv(&self.stream, &mut beats, RecvFlags::empty()) {
            Ok((1.., _)) => self.heard = now,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok((0, _)) | Err(_) => self.gone = true,
        }
    }
}

/// The thread's own side.
struct Listener {
    shared: Arc<Shared>,
    neighbours: Vec<Neighbour>,
    interval: Duration,
}

impl Listener {
    fn run(mut self) {
        let mut next_beat = Instant::now();
        let mut looked = next_beat;
        loop {
            let now = Instant::now();
            if now.duration_since(looked) > 2 * self.interval {
                self.start_over(now);
            }
            looked = now;
            if now >= next_beat {
                self.neighbours.iter().for_each(Neighbour::beat);
                next_beat = now + self.interval;
            }
            self.neighbours.iter_mut().for_each(|neighbour| neighbour.listen(now));
            self.neighbours.retain(|neighbour| !neighbour.gone);
            if self.judge(now) {
                return;
            }
            self.sleep(next_beat);
        }
    }

    /// This process was held up: what the others did meanwhile, nobody knows.
    fn start_over(&mut self, now: Instant) {
        self.neighbours.iter_mut().for_each(|neighbour| neighbour.heard = now);
        let since = &mut self.shared.findings.lock().farewell_since;
        *since = since.map(|_| now);
    }

    /// Notes who was silent for too long; gives whether it is time to stop.
    fn judge(&mut self, now: Instant) -> bool {
        let timeout = self.shared.timeout;
        let silent = |neighbour: &Neighbour| now.duration_since(neighbour.heard) >= timeout;
        let mut findings = self.shared.findings.lock();
        let before = findings.silent.len();
        findings.silent.extend(self.neighbours.iter().filter(|neighbour| silent(neighbour)).map(|n| n.rank));
        self.neighbours.retain(|neighbour| !silent(neighbour));
        let overdue = findings.farewell_since.take_if(|since| now.duration_since(*since) >= timeout).is_some();
        if overdue {
            findings.farewell_timeouts += 1;
            findings.farewell_since = Some(now);
        }
        if overdue || findings.silent.len() > before {
            self.shared.raise_alarm();
        }
        findings.stop
    }

    /// Sleeps until there is something to hear or to do.
    fn sleep(&self, next_beat: Instant) {
        let mut fds = vec![PollFd::new(&self.shared.nudge, PollFlags::IN)];
        fds.extend(self.neighbours.iter().map(|n| PollFd::from_borrowed_fd(n.stream.as_fd(), PollFlags::IN)));
        let left = next_beat.saturating_duration_since(Instant::now());
        // An error cannot be reported here, and ends in a shorter sleep.
        let _ = poll(&mut fds, Some(&to_timespec(left)));
        let _ = rustix::io::read(&self.shared.nudge, &mut [0; 8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_its_neighbours_in_the_ring() {
        assert!(neighbours(0, 1).is_empty());
        assert_eq!(neighbours(0, 2), [1]);
        assert_eq!(neighbours(1, 2), [0]);
        assert_eq!(neighbours(0, 5), [1, 4]);
        assert_eq!(neighbours(4, 5), [0, 3]);
    }
}
