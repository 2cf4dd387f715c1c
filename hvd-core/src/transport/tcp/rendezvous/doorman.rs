//! Accepts connections and greets each on a thread of its own, so that a silent stranger holds nobody up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::stream::{Listener, Stream};
use crate::error::{Error, Result};
use crate::transport::tcp::bell::to_timespec;

/// Most greetings at a time; further callers wait in the kernel's queue.
const MAX_GREETINGS: usize = 256;

/// How long one greeting may take.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Says whether a connection is one of ours, by the deadline; a stranger's gives an error and is dropped.
type Greet<T> = dyn Fn(Stream, Instant) -> io::Result<T> + Send + Sync;

/// A listener, and what its greetings (and other threads) have come to.
pub(super) struct Doorman<T> {
    listener: Listener,
    greet: Arc<Greet<T>>,
    sender: Doorbell<T>,
    receiver: Receiver<T>,
    busy: Arc<AtomicUsize>,
}

/// Hands results to a doorman from another thread.
pub(super) struct Doorbell<T> {
    sender: Sender<T>,
    wake: Arc<OwnedFd>,
}

impl<T> Clone for Doorbell<T> {
    fn clone(&self) -> Self {
        Doorbell { sender: self.sender.clone(), wake: self.wake.clone() }
    }
}

impl<T> Doorbell<T> {
    pub(super) fn send(&self, value: T) {
        if self.sender.send(value).is_ok() {
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl<T: Send + 'static> Doorman<T> {
    pub(super) fn new(
        listener: Listener,
        greet: impl Fn(Stream, Instant) -> io::Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("creating an eventfd", error))?;
        let (sender, receiver) = channel();
        let sender = Doorbell { sender, wake: Arc::new(wake) };
        Ok(Doorman { listener, greet: Arc::new(greet), sender, receiver, busy: Arc::default() })
    }

    pub(super) fn bell(&self) -> Doorbell<T> {
        self.sender.clone()
    }

    /// What a greeting has come to, if any has ended.
    pub(super) fn next(&self) -> Option<T> {
        self.receiver.try_recv().ok()
    }

    /// Sleeps until a greeting has ended, a watched connection has something to say, or the deadline is over. Gives the
    /// positions of those connections.
    pub(super) fn wait(&self, watched: &[&Stream], deadline: Instant) -> Result<Vec<usize>> {
        let may_accept = self.busy.load(Ordering::Acquire) < MAX_GREETINGS;
        let listening = if may_accept { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.sender.wake.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), listening),
        ];
        fds.extend(watched.iter().map(|stream| PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)));
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut fds, Some(&to_timespec(left))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("waiting for the other ranks", error)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] {
            let _ = rustix::io::read(&*self.sender.wake, &mut [0; 8]);
        }
        if ready[1] && may_accept {
            self.accept();
        }
        Ok((0..watched.len()).filter(|index| ready[index + 2]).collect())
    }

    fn accept(&self) {
        match self.listener.accept() {
            Ok(stream) => self.start_greeting(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Out of descriptors, most likely: a moment later some greeting may have ended.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }

    fn start_greeting(&self, stream: Stream) {
        let (greet, sender, busy) = (self.greet.clone(), self.sender.clone(), self.busy.clone());
        busy.fetch_add(1, Ordering::AcqRel);
        let thread = std::thread::Builder::new().name("hvd-greeting".into()).spawn(move || {
            let from = stream.peer_ip();
            match greet(stream, Instant::now() + GREETING_TIMEOUT) {
                Ok(value) => sender.send(value),
                Err(error) => tracing::warn!(?from, %error, "dropped a stranger's connection"),
            }
            busy.fetch_sub(1, Ordering::AcqRel);
            // A doorman at its limit sleeps until there is room.
            let _ = rustix::io::write(&*sender.wake, &1u64.to_ne_bytes());
        });
        if thread.is_err() {
            self.busy.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
