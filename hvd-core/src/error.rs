//! One error type for the whole runtime. Each text names what is wrong and what to do next.

use std::fmt;
use std::sync::Arc;

/// What can go wrong in the runtime.
///
/// Cheap to clone: a failure of the world reaches every operation that was in flight. Its `Debug` is its text, as that is what users see
/// of a `main` that returns it and of `unwrap`.
#[derive(Clone, thiserror::Error)]
pub enum Error {
    /// The ranks submitted different things under one name. The world goes on.
    #[error("ranks disagree on `{name}`: {detail}")]
    Mismatch {
        /// The tensor's name.
        name: String,
        /// Which ranks sent what.
        detail: String,
    },

    /// This rank asked for something that no rank could do. The world goes on.
    #[error("{0}")]
    Invalid(String),

    /// A peer is gone. The world is lost: every operation fails with this error.
    #[error("lost rank {rank}: {cause}")]
    PeerLost {
        /// The rank that failed first, as far as this rank can tell.
        rank: usize,
        /// What is known of the reason.
        cause: String,
    },

    /// A peer lives, and has ended the world for what it has seen. Every operation fails with this error.
    #[error("rank {rank} ended the job: {cause}")]
    PeerGaveUp {
        /// The rank that ended it.
        rank: usize,
        /// Why.
        cause: String,
    },

    /// Tensors have waited for too long for ranks that have not submitted them. The world is lost.
    #[error("{0}; HVD_STALL_SHUTDOWN_TIME_SECONDS says how long they may wait")]
    Stalled(String),

    /// The world was shut down before or while the operation ran.
    #[error("the world has been shut down: {0}")]
    ShutDown(String),

    /// The global functions were called before [`crate::world::init`].
    #[error("hvd is not initialised; call `init()` first")]
    NotInitialised,

    /// The launcher's variables or the runtime's settings make no sense.
    #[error("{0}")]
    Config(String),

    /// The ranks could not find each other.
    #[error("rendezvous failed: {0}")]
    Rendezvous(String),

    /// Bytes from a peer or a stranger do not follow the protocol.
    #[error("protocol violation by {peer}: {detail}")]
    Protocol {
        /// Who sent them.
        peer: String,
        /// What was wrong.
        detail: String,
    },

    /// The operating system refused something.
    #[error("{what}: {answer}")]
    Io {
        /// What was being tried.
        what: String,
        /// The system's answer.
        answer: Arc<std::io::Error>,
    },
}

impl Error {
    /// Wraps an operating-system error with what was being tried.
    pub fn io(what: impl Into<String>, answer: impl Into<std::io::Error>) -> Self {
        Error::Io { what: what.into(), answer: Arc::new(answer.into()) }
    }

    /// Whether the world survives this error, so that other operations go on.
    pub fn is_recoverable(&self) -> bool {
        matches!(self, Error::Mismatch { .. } | Error::Invalid(_))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A result with the runtime's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
