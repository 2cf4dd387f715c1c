//! Built-in transport over TCP: one connection for each pair of ranks, all driven by whoever calls
//! [`Transport::progress`].
//!
//! A payload is read straight into the memory of its receive when that was posted in time, and into a buffer of its
//! own otherwise. A connection that ends without a goodbye means that the world is lost; who notices tells all others
//! who was first, so that every rank names the same one. A peer that is stopped, or whose host is cut off, is noticed by its
//! silence ([`heartbeat`]).

mod bell;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod heartbeat;
mod incoming;
mod link;
mod outgoing;
pub mod rendezvous;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

pub(crate) use bell::Bell;
use bell::to_timespec;
use frame::Kind;
use heartbeat::Heartbeat;
use incoming::Inbox;
use link::Link;
use rendezvous::Connections;
pub use rendezvous::{Identity, Meeting, Secret, source_address};

use super::matching::{Matching, Posted};
use super::requests::Requests;
use super::{Request, Tag, Transport, Verdict, Waiter};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// How long a failing rank tries to tell the others why.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(200);

/// Settings of the transport.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// The address that this rank listens on for the others. Default: loopback.
    pub bind: Option<IpAddr>,
    /// How long to wait for all ranks at the start. Default: 30 s.
    pub start_timeout: Duration,
    /// How long a peer may give no sign of life; zero: for ever. The same on all ranks. Default: 30 s.
    pub peer_timeout: Duration,
    /// Bound on the messages of one peer that have come before anybody waits for them, in bytes. Beyond it the world
    /// fails. Default: 4 GiB.
    pub unexpected_limit_bytes: usize,
    /// Size of the kernel's buffers of each connection, in bytes. Default: the kernel adapts it, which is best on most
    /// systems, where a fixed size is held to `net.core.wmem_max`.
    pub socket_buffer_bytes: Option<usize>,
}

impl Default for TcpOptions {
    fn default() -> Self {
        TcpOptions {
            bind: None,
            start_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(30),
            unexpected_limit_bytes: 4 << 30,
            socket_buffer_bytes: None,
        }
    }
}

/// The transport of one rank.
pub struct TcpTransport {
    identity: Identity,
    links: Vec<Option<Link>>,
    inbox: Inbox,
    bell: Arc<Bell>,
    /// `None` where peers may be silent.
    heartbeat: Option<Heartbeat>,
    /// Whether this rank has said goodbye.
    closing: bool,
    failed: Option<Error>,
}

impl TcpTransport {
    /// Meets the other ranks and connects with each. A world of one needs no sockets.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if the ranks do not find each other in time or do not fit together.
    pub fn connect(identity: Identity, meeting: &Meeting, options: &TcpOptions) -> Result<TcpTransport> {
        check_identity(identity)?;
        let connections = match identity.size {
            1 => Connections::none(1),
            _ => rendezvous::gather(identity, meeting, options)?,
        };
        Self::over(identity, connections, options)
    }

    /// As [`TcpTransport::connect`], where the ranks can exchange their addresses by other means: `exchange` is given
    /// this rank's address and 32 random bytes, and gives back the addresses of all ranks and the random bytes of
    /// rank 0, which keep strangers out.
    pub fn connect_through(
        identity: Identity,
        options: &TcpOptions,
        exchange: impl FnOnce(SocketAddr, [u8; 32]) -> Result<(Vec<SocketAddr>, [u8; 32])>,
    ) -> Result<TcpTransport> {
        check_identity(identity)?;
        let connections = match identity.size {
            1 => Connections::none(1),
            _ => rendezvous::gather_through(identity, options, exchange)?,
        };
        Self::over(identity, connections, options)
    }

    fn over(identity: Identity, connections: Connections, options: &TcpOptions) -> Result<Self> {
        let bell = Arc::new(Bell::new()?);
        let mut links = Vec::with_capacity(identity.size);
        for (peer, stream) in connections.mesh.into_iter().enumerate() {
            let link = stream.map(|stream| Link::new(peer, stream, identity.generation, options, &bell));
            links.push(link.transpose()?);
        }
        let inbox = Inbox {
            matching: Matching::new(identity.size),
            requests: Requests::default(),
            generation: identity.generation,
            unexpected_limit_bytes: options.unexpected_limit_bytes,
            abort: None,
            rung: false,
        };
        let heartbeat = match options.peer_timeout.is_zero() || identity.size == 1 {
            true => None,
            false => Some(Heartbeat::start(connections.heartbeat, options.peer_timeout, bell.clone())?),
        };
        Ok(TcpTransport { identity, links, inbox, bell, heartbeat, closing: false, failed: None })
    }

    /// Who this rank is.
    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether a peer has said goodbye.
    pub(super) fn has_left(&self, peer: usize) -> bool {
        self.links[peer].as_ref().is_some_and(|link| link.incoming.goodbye)
    }

    /// Nobody will test this request: it is forgotten when it is complete.
    pub(super) fn forget(&mut self, request: Request) {
        self.inbox.requests.forget(request);
    }

    fn check(&self, peer: Option<usize>) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match peer {
            Some(peer) if peer >= self.identity.size => {
                Err(Error::Invalid(format!("there is no rank {peer} in a world of {}", self.identity.size)))
            }
            _ => Ok(()),
        }
    }

    /// Remembers the first error, tells the others, and lets go of all memory.
    pub(super) fn fail(&mut self, error: Error) -> Error {
        if let Some(first) = &self.failed {
            return first.clone();
        }
        // What a peer has said of the cause is nearer to the truth than what this rank saw of it.
        let error = self.inbox.abort.take().map_or(error, Verdict::into_error);
        self.failed = Some(error.clone());
        self.say_last_words(&Verdict::of(self.identity.rank, &error));
        self.inbox.matching.clear();
        self.links.iter_mut().flatten().for_each(Link::release);
        error
    }

    /// Sends everybody an abort, for a bounded time, and ends this direction of all connections.
    fn say_last_words(&mut self, verdict: &Verdict) {
        let deadline = Instant::now() + LAST_WORDS_TIMEOUT;
        for link in self.links.iter_mut().flatten().filter(|link| link.closed.is_none()) {
            link.outgoing.push_abort(verdict);
        }
        loop {
            for link in self.links.iter_mut().flatten() {
                link.flush_last(&mut self.inbox);
            }
            let stuck: Vec<_> = self.links.iter().flatten().filter(|link| !link.is_flushed()).collect();
            if stuck.is_empty() || !sleep_until_ready(&stuck, PollFlags::OUT, deadline) {
                break;
            }
        }
        self.links.iter().flatten().for_each(Link::shutdown_write);
    }

    fn progress_inner(&mut self) -> Result<bool> {
        let mut moved = false;
        for link in self.links.iter_mut().flatten().filter(|link| link.is_writable()) {
            moved |= link.flush(&mut self.inbox, &self.bell)?;
        }
        for ready in self.bell.ready()? {
            let Some(link) = self.links.get_mut(ready.peer).and_then(Option::as_mut) else { continue };
            if ready.writable {
                moved |= link.flush(&mut self.inbox, &self.bell)?;
            }
            if ready.readable || link.outgoing.broken {
                moved |= link.read(&mut self.inbox, &self.bell)?;
            }
        }
        if std::mem::take(&mut self.inbox.rung) {
            self.bell.wake(); // The ring is for who sleeps next, whoever has read it.
            moved = true;
        }
        self.check_peers()?;
        Ok(moved)
    }

    /// Fails if a peer has given up, has died, or will never send what this rank waits for.
    fn check_peers(&mut self) -> Result<()> {
        if self.links.iter().flatten().any(|link| link.closed.is_some() && !link.incoming.goodbye) {
            // Somebody may have said who was first.
            for link in self.links.iter_mut().flatten() {
                link.read(&mut self.inbox, &self.bell)?;
            }
        }
        if let Some(verdict) = self.inbox.abort.take() {
            return Err(verdict.into_error());
        }
        for link in self.links.iter().flatten() {
            let cause = match &link.closed {
                Some(how) if !link.incoming.goodbye => how.clone(),
                _ if link.incoming.goodbye && !self.closing && self.inbox.matching.waits_for(link.peer) => {
                    "it left the world while this rank waits for a message of it".into()
                }
                _ => continue,
            };
            return Err(Error::PeerLost { rank: link.peer, cause });
        }
        self.check_heartbeat()
    }

    /// Fails if a peer that has not said goodbye is silent, or its goodbye is overdue.
    fn check_heartbeat(&self) -> Result<()> {
        let Some(heartbeat) = &self.heartbeat else { return Ok(()) };
        let seconds = heartbeat.timeout().as_secs_f64();
        let lost = |rank, cause| Err(Error::PeerLost { rank, cause });
        if let Some(rank) = heartbeat.silent().into_iter().find(|&rank| !self.has_left(rank)) {
            let hint = "it was stopped, or its host is down or cut off (HVD_PEER_TIMEOUT sets how long to wait)";
            return lost(rank, format!("it has given no sign of life for {seconds} s; {hint}"));
        }
        let timeouts = heartbeat.farewell_timeouts();
        if timeouts == 0 {
            return Ok(());
        }
        // Of several, all but one may wait for that one, whose silence its neighbours notice before two timeouts are over.
        let mut late = self.links.iter().flatten().filter(|link| !link.incoming.goodbye).map(|link| link.peer);
        match (late.next(), late.next()) {
            (Some(_), Some(_)) if timeouts == 1 => Ok(()),
            (Some(peer), _) => {
                lost(peer, format!("it did not say goodbye within {seconds} s, although all ranks shut down"))
            }
            (None, _) => Ok(()),
        }
    }

    fn send_inner(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request> {
        let Some(link) = &mut self.links[peer] else {
            // SAFETY: the bytes do not change until the request is done, which it is from the start.
            let delivered = self.inbox.matching.deliver(peer, tag, unsafe { data.as_slice() })?;
            if let Some(request) = delivered {
                self.inbox.requests.complete(request);
            }
            return Ok(self.inbox.requests.open_done());
        };
        let request = self.inbox.requests.open();
        let idle = !link.outgoing.is_pending();
        link.outgoing.push_data(tag, data, request);
        if idle {
            link.flush(&mut self.inbox, &self.bell)?;
        }
        Ok(request)
    }

    fn recv_inner(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request> {
        let request = self.inbox.requests.open();
        let Some(posted) = self.inbox.meet(peer, tag, Posted { request, into })? else { return Ok(request) };
        let waiting = match &mut self.links[peer] {
            Some(link) => link.incoming.adopt(tag, posted)?,
            None => Some(posted),
        };
        if let Some(posted) = waiting {
            self.inbox.matching.post(peer, tag, posted)?;
        }
        Ok(request)
    }

    /// Reads and drops what still comes, until the peers have closed, too: closing a socket with unread bytes would
    /// throw away our last words on their way.
    fn drain(&mut self) {
        let deadline = Instant::now() + LAST_WORDS_TIMEOUT;
        let mut scrap = vec![0; 64 << 10];
        let mut open: Vec<&Link> = self.links.iter().flatten().filter(|link| link.closed.is_none()).collect();
        while !open.is_empty() && sleep_until_ready(&open, PollFlags::IN, deadline) {
            open.retain(|link| match std::io::Read::read(&mut link.stream(), &mut scrap) {
                Ok(count) => count > 0,
                Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
            });
        }
    }
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn rank(&self) -> usize {
        self.identity.rank
    }

    fn size(&self) -> usize {
        self.identity.size
    }

    fn send(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request> {
        self.check(Some(peer))?;
        self.send_inner(peer, tag, data).map_err(|error| self.fail(error))
    }

    fn recv(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request> {
        self.check(Some(peer))?;
        self.recv_inner(peer, tag, into).map_err(|error| self.fail(error))
    }

    fn try_recv_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>> {
        self.check(Some(peer))?;
        self.inbox.matching.take_any(peer, tag).map_err(|error| self.fail(error))
    }

    fn test(&mut self, request: Request) -> Result<bool> {
        self.check(None)?;
        self.inbox.requests.test(request)
    }

    fn ring(&mut self, peer: usize) -> Result<()> {
        self.check(Some(peer))?;
        let Some(link) = &mut self.links[peer] else {
            self.bell.wake();
            return Ok(());
        };
        link.outgoing.push_signal(Kind::Ring);
        link.flush(&mut self.inbox, &self.bell).map(drop).map_err(|error| self.fail(error))
    }

    fn progress(&mut self) -> Result<bool> {
        self.check(None)?;
        self.progress_inner().map_err(|error| self.fail(error))
    }

    fn is_streaming(&self) -> bool {
        self.links.iter().flatten().any(Link::is_streaming)
    }

    fn abort(&mut self, error: &Error) {
        self.inbox.abort = None;
        self.fail(error.clone());
    }

    fn close(&mut self) -> Result<bool> {
        self.check(None)?;
        if !std::mem::replace(&mut self.closing, true) {
            self.links.iter_mut().flatten().for_each(|link| link.outgoing.push_signal(Kind::Goodbye));
            self.heartbeat.iter().for_each(Heartbeat::expect_farewell);
        }
        self.progress()?;
        let all_gone = |link: &Link| link.is_flushed() && link.incoming.goodbye;
        Ok(self.links.iter().flatten().all(all_gone))
    }

    fn waiter(&self) -> Arc<dyn Waiter> {
        self.bell.clone()
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        if !self.closing && self.failed.is_none() && std::thread::panicking() {
            self.fail(Error::ShutDown("its thread panicked".into()));
        }
        if self.failed.is_some() {
            self.drain();
        }
    }
}

fn check_identity(identity: Identity) -> Result<()> {
    let Identity { rank, size, .. } = identity;
    if rank < size && size <= u32::MAX as usize {
        return Ok(());
    }
    Err(Error::Config(format!("rank {rank} cannot be in a world of {size}")))
}

/// Sleeps until one of the links is ready; gives whether one was before the deadline.
fn sleep_until_ready(links: &[&Link], flags: PollFlags, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return false;
    }
    let mut fds: Vec<_> = links.iter().map(|link| PollFd::new(link.stream(), flags)).collect();
    poll(&mut fds, Some(&to_timespec(left))).is_ok()
}
