//! Brings messages and the receives that were posted for them together.

use std::collections::{HashMap, VecDeque};

use super::{MAX_MESSAGE_BYTES, Request, Tag};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// What it costs to keep a message beside its bytes, or somewhat more: messages of no bytes count as well.
pub(crate) const KEEPING_BYTES: usize = 64;

/// A receive that waits for its message.
pub(crate) struct Posted {
    pub(crate) request: Request,
    pub(crate) into: Memory,
}

/// Receives without a message and messages without a receive, in order per peer and tag. For one peer and tag, at most
/// one of the two exists.
pub(crate) struct Matching {
    posted: HashMap<(usize, Tag), VecDeque<Posted>>,
    arrived: HashMap<(usize, Tag), VecDeque<Vec<u8>>>,
    /// Per peer: number of receives in `posted`.
    waiting: Vec<usize>,
    /// Per peer: bytes in `arrived`, and what it costs to keep them.
    arrived_bytes: Vec<usize>,
}

impl Matching {
    pub(crate) fn new(size: usize) -> Self {
        Matching {
            posted: HashMap::new(),
            arrived: HashMap::new(),
            waiting: vec![0; size],
            arrived_bytes: vec![0; size],
        }
    }

    /// Meets a receive with a message that is here already; gives whether that completed it. If not, the receive is
    /// kept and waits.
    pub(crate) fn post(&mut self, peer: usize, tag: Tag, posted: Posted) -> Result<bool> {
        if let Some(bytes) = self.take_arrived(peer, tag) {
            fill(peer, tag, &posted.into, &bytes)?;
            return Ok(true);
        }
        self.waiting[peer] += 1;
        self.posted.entry((peer, tag)).or_default().push_back(posted);
        Ok(false)
    }

    /// The receive that the next message of this peer and tag belongs to, if one waits.
    pub(crate) fn take_posted(&mut self, peer: usize, tag: Tag) -> Option<Posted> {
        let posted = pop(&mut self.posted, (peer, tag))?;
        self.waiting[peer] -= 1;
        Some(posted)
    }

    /// Keeps a message that nobody waits for yet.
    pub(crate) fn keep(&mut self, peer: usize, tag: Tag, bytes: Vec<u8>) {
        self.arrived_bytes[peer] += bytes.len() + KEEPING_BYTES;
        self.arrived.entry((peer, tag)).or_default().push_back(bytes);
    }

    /// A whole message has come: gives the request that it completes, or keeps a copy.
    pub(crate) fn deliver(&mut self, peer: usize, tag: Tag, bytes: &[u8]) -> Result<Option<Request>> {
        let Some(posted) = self.take_posted(peer, tag) else {
            self.keep(peer, tag, bytes.to_vec());
            return Ok(None);
        };
        fill(peer, tag, &posted.into, bytes)?;
        Ok(Some(posted.request))
    }

    /// The next message that nobody posted a receive for.
    pub(crate) fn take_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>> {
        match self.take_arrived(peer, tag) {
            Some(bytes) if bytes.len() > MAX_MESSAGE_BYTES => Err(too_long(peer, tag, bytes.len())),
            other => Ok(other),
        }
    }

    /// Whether a message is kept for this peer and tag.
    pub(crate) fn has_arrived(&self, peer: usize, tag: Tag) -> bool {
        self.arrived.contains_key(&(peer, tag))
    }

    /// Whether a receive waits for this peer.
    pub(crate) fn waits_for(&self, peer: usize) -> bool {
        self.waiting[peer] > 0
    }

    /// Bytes of this peer that are kept, and what it costs to keep them.
    pub(crate) fn arrived_bytes(&self, peer: usize) -> usize {
        self.arrived_bytes[peer]
    }

    /// Forgets everything and lets go of all memory.
    pub(crate) fn clear(&mut self) {
        *self = Matching::new(self.waiting.len());
    }

    fn take_arrived(&mut self, peer: usize, tag: Tag) -> Option<Vec<u8>> {
        let bytes = pop(&mut self.arrived, (peer, tag))?;
        self.arrived_bytes[peer] -= bytes.len() + KEEPING_BYTES;
        Some(bytes)
    }
}

/// Takes the first of a queue, and the queue away when it is empty: tags come and go.
fn pop<T>(queues: &mut HashMap<(usize, Tag), VecDeque<T>>, key: (usize, Tag)) -> Option<T> {
    let queue = queues.get_mut(&key)?;
    let first = queue.pop_front();
    if queue.is_empty() {
        queues.remove(&key);
    }
    first
}

/// Copies a message to where its receive wants it.
fn fill(peer: usize, tag: Tag, into: &Memory, bytes: &[u8]) -> Result<()> {
    check_length(peer, tag, into.len() as u64, bytes.len() as u64)?;
    // SAFETY: the memory was given to the transport for writing until the request is complete.
    unsafe { into.as_mut_slice() }.copy_from_slice(bytes);
    Ok(())
}

/// Refuses a message of another length than its receive expects.
pub(crate) fn check_length(peer: usize, tag: Tag, expected: u64, came: u64) -> Result<()> {
    if expected == came {
        return Ok(());
    }
    Err(Error::Protocol {
        peer: format!("rank {peer}"),
        detail: format!("a message of {came} bytes came where {expected} were expected ({tag:?})"),
    })
}

fn too_long(peer: usize, tag: Tag, bytes: usize) -> Error {
    Error::Protocol {
        peer: format!("rank {peer}"),
        detail: format!("a message of {bytes} bytes exceeds the limit of {MAX_MESSAGE_BYTES} ({tag:?})"),
    }
}
