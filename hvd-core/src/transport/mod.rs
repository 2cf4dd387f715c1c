//! Tagged, non-blocking bytes between ranks, and nothing else.
//!
//! A [`Transport`] belongs to one rank of one world and is driven by whoever holds it: nothing moves outside
//! [`Transport::progress`], so that a caller that waits can drive it itself.

pub(crate) mod matching;
pub mod mpi;
pub(crate) mod requests;
pub(crate) mod subset;
pub(crate) mod talk;
pub mod tcp;
pub mod thread;

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::memory::Memory;

/// Names a stream of messages between two ranks. Messages of one tag arrive in the order in which they were sent, and
/// meet the receives of that tag in the order in which those were posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag {
    /// Who talks: the engine's negotiation, a process set's operations, a test.
    pub channel: u32,
    /// Which of the channel's operations; wraps around.
    pub sequence: u32,
}

/// A send or receive under way. Given back to the transport by a [`Transport::test`] that answers `true`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request(pub u64);

/// The largest message whose length the receiver does not know beforehand, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// Point-to-point messages between the ranks of a world.
///
/// Every method returns at once. An error from any of them means that the world is lost (a peer died or broke the
/// protocol): the transport will only ever answer with that same error from then on.
pub trait Transport: Send {
    /// Its name in logs, tests and benchmarks: `thread`, `tcp`, `mpi`.
    fn name(&self) -> &'static str;

    /// This rank, `0 .. size`.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Starts to send all of `data`. The bytes must not change until the request tests true. Sending to oneself works.
    fn send(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request>;

    /// Starts to receive a message of exactly `into.len()` bytes; another length is a protocol error.
    fn recv(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request>;

    /// Takes a message of any length up to [`MAX_MESSAGE_BYTES`] if one of this tag has arrived whole. Never mixed with
    /// [`Transport::recv`] on one tag.
    fn try_recv_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>>;

    /// Whether a request is complete; if so, the transport forgets it and drops its memory.
    fn test(&mut self, request: Request) -> Result<bool>;

    /// Wakes `peer` if it sleeps on its [`Transport::waiter`]; carries no data. For those who share memory with it.
    fn ring(&mut self, peer: usize) -> Result<()>;

    /// Moves what can be moved without blocking. Gives whether anything moved.
    fn progress(&mut self) -> Result<bool>;

    /// Whether long messages are under way whose bytes this rank moves faster than they come or go: whoever waits for them
    /// had better sleep than look again.
    fn is_streaming(&self) -> bool {
        false
    }

    /// Tells the peers that this rank gives up, and why, as far as that goes without blocking for long, so that their
    /// errors name the first cause. The transport is unusable afterwards.
    fn abort(&mut self, error: &Error);

    /// Says goodbye: from now on a closed connection from or to a peer is no failure. Gives `true` when all peers have
    /// said it too and all sends are out. To be polled.
    fn close(&mut self) -> Result<bool>;

    /// What to sleep on until [`Transport::progress`] may have something to do.
    fn waiter(&self) -> Arc<dyn Waiter>;
}

/// What a thread sleeps on while there is nothing to do, and how others wake it.
pub trait Waiter: Send + Sync {
    /// Sleeps until bytes can move, somebody calls [`Waiter::wake`], or `timeout` is over (`None`: no limit). A wake-up
    /// that comes before the call is not lost. May return early for no reason.
    fn wait(&self, timeout: Option<Duration>);

    /// Ends a sleep under way, or else the next one.
    fn wake(&self);
}

/// Why a world ends, as one rank tells the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The rank that failed first.
    pub(crate) rank: usize,
    /// What is known of the reason.
    pub(crate) cause: String,
    /// Whether that rank is well, and only says what it has seen of others.
    pub(crate) gave_up: bool,
}

impl Verdict {
    /// What a rank that ends with `error` has to tell.
    pub(crate) fn of(own_rank: usize, error: &Error) -> Self {
        let (rank, cause) = match error {
            Error::PeerLost { rank, cause } | Error::PeerGaveUp { rank, cause } => (*rank, cause.clone()),
            Error::ShutDown(cause) => (own_rank, cause.clone()),
            other => (own_rank, other.to_string()),
        };
        Verdict { rank, cause, gave_up: matches!(error, Error::PeerGaveUp { .. } | Error::Stalled(_)) }
    }

    /// What a rank that has been told ends with.
    pub(crate) fn into_error(self) -> Error {
        let Verdict { rank, cause, gave_up } = self;
        if gave_up { Error::PeerGaveUp { rank, cause } } else { Error::PeerLost { rank, cause } }
    }
}
