//! Accepts connections and greets each on a thread of its own, so that a silent stranger holds nobody up.
//!
//! Where strangers crowd the door, the one that has been there longest has to go: a rank proves itself in a moment, and
//! comes again if it was pushed out.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::stream::{Listener, Stream};
use crate::error::{Error, Result};
use crate::transport::tcp::bell::to_timespec;

/// Most greetings at a time; further callers wait in the kernel's queue.
const MAX_GREETINGS: usize = 128;

/// So long a greeting is left alone, however many wait.
const UNDISTURBED: Duration = Duration::from_millis(100);

/// Strangers that are reported; more would only fill the log.
const REPORTED: usize = 10;

/// How long one greeting may take.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Says whether a connection is one of ours, by the deadline; a stranger's gives an error and is dropped.
type Greet<T> = dyn Fn(Stream, Instant, &Ticket) -> io::Result<T> + Send + Sync;

/// A listener, and what its greetings (and other threads) have come to.
pub(super) struct Doorman<T> {
    listener: Listener,
    greet: Arc<Greet<T>>,
    sender: Doorbell<T>,
    receiver: Receiver<T>,
    greetings: Greetings,
    next_number: AtomicU64,
    strangers: Arc<AtomicUsize>,
}

/// Greetings under way whose callers have not proved anything yet, the oldest first.
type Greetings = Arc<Mutex<VecDeque<Greeting>>>;

/// A greeting under way.
struct Greeting {
    number: u64,
    since: Instant,
    /// Another descriptor of its connection, to end it by.
    connection: OwnedFd,
}

/// What a greeting knows itself by.
pub(super) struct Ticket {
    number: u64,
    greetings: Greetings,
}

impl Ticket {
    /// The caller is no stranger: from now on it cannot be pushed out. `false` if it has been.
    pub(super) fn settle(&self) -> bool {
        let mut greetings = self.greetings.lock();
        let before = greetings.len();
        greetings.retain(|greeting| greeting.number != self.number);
        greetings.len() < before
    }
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
        greet: impl Fn(Stream, Instant, &Ticket) -> io::Result<T> + Send + Sync + 'static,
    ) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("creating an eventfd", error))?;
        let (sender, receiver) = channel();
        let sender = Doorbell { sender, wake: Arc::new(wake) };
        let (greetings, next_number, strangers) = Default::default();
        Ok(Doorman { listener, greet: Arc::new(greet), sender, receiver, greetings, next_number, strangers })
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
        let room_in = self.time_to_room();
        let may_accept = room_in.is_zero();
        let listening = if may_accept { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.sender.wake.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), listening),
        ];
        fds.extend(watched.iter().map(|stream| PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)));
        let mut left = deadline.saturating_duration_since(Instant::now());
        if !may_accept {
            left = left.min(room_in);
        }
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

    /// How long it takes until another caller may come in: none while there is room, or somebody who can be pushed out.
    fn time_to_room(&self) -> Duration {
        let greetings = self.greetings.lock();
        match greetings.front() {
            Some(oldest) if greetings.len() >= MAX_GREETINGS => UNDISTURBED.saturating_sub(oldest.since.elapsed()),
            _ => Duration::ZERO,
        }
    }

    fn start_greeting(&self, stream: Stream) {
        // Without a second descriptor there is no room for this caller either.
        let Ok(connection) = stream.as_fd().try_clone_to_owned() else { return };
        let ticket = self.enter(connection);
        let (greet, sender, strangers) = (self.greet.clone(), self.sender.clone(), self.strangers.clone());
        let number = ticket.number;
        let thread = std::thread::Builder::new().name("hvd-greeting".into()).spawn(move || {
            let from = stream.peer_ip();
            let greeted = greet(stream, Instant::now() + GREETING_TIMEOUT, &ticket);
            ticket.settle();
            match greeted {
                Ok(value) => sender.send(value),
                Err(error) => report(strangers.fetch_add(1, Ordering::Relaxed), from, &error),
            }
            // A doorman at its limit sleeps until there is room.
            let _ = rustix::io::write(&*sender.wake, &1u64.to_ne_bytes());
        });
        if thread.is_err() {
            self.greetings.lock().retain(|greeting| greeting.number != number);
        }
    }

    /// Notes a greeting that begins, for which another may have to end.
    fn enter(&self, connection: OwnedFd) -> Ticket {
        let mut greetings = self.greetings.lock();
        if greetings.len() >= MAX_GREETINGS
            && let Some(oldest) = greetings.pop_front()
        {
            // Its thread sees the end of the connection.
            let _ = rustix::net::shutdown(&oldest.connection, rustix::net::Shutdown::Both);
        }
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        greetings.push_back(Greeting { number, since: Instant::now(), connection });
        Ticket { number, greetings: self.greetings.clone() }
    }
}

/// Tells of a stranger, unless there were many before.
fn report(before: usize, from: Option<IpAddr>, error: &io::Error) {
    match before {
        ..REPORTED => tracing::warn!(?from, %error, "dropped a stranger's connection"),
        REPORTED => tracing::warn!("dropped more connections of strangers; they are not reported"),
        _ => {}
    }
}
