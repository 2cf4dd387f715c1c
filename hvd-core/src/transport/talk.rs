//! A few messages at the start of a world, before there is an engine: sent and awaited with patience.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Tag, Transport, Waiter};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// How long to sleep at most where something that the transport's waiter does not watch may have happened.
const NAP: Duration = Duration::from_micros(500);

/// A transport with patience, up to a deadline.
pub(crate) struct Talk<'a> {
    pub(crate) transport: &'a mut dyn Transport,
    waiter: Arc<dyn Waiter>,
    pub(crate) deadline: Instant,
    /// What the ranks are about, as an error puts it.
    purpose: &'static str,
}

impl<'a> Talk<'a> {
    pub(crate) fn new(transport: &'a mut dyn Transport, deadline: Instant, purpose: &'static str) -> Self {
        Talk { waiter: transport.waiter(), transport, deadline, purpose }
    }

    /// Sends a message, whole.
    pub(crate) fn tell(&mut self, peer: usize, tag: Tag, bytes: &[u8]) -> Result<()> {
        let request = self.transport.send(peer, tag, Memory::from_vec(bytes.to_vec()))?;
        while !self.transport.test(request)? {
            self.check_deadline(peer)?;
            self.nap()?;
        }
        Ok(())
    }

    /// Sends a message of rank 0 to all others.
    pub(crate) fn tell_all(&mut self, tag: Tag, bytes: &[u8]) -> Result<()> {
        (1..self.transport.size()).try_for_each(|peer| self.tell(peer, tag, bytes))
    }

    /// Waits for a message, doing `meanwhile` over and over.
    pub(crate) fn hear(&mut self, peer: usize, tag: Tag, mut meanwhile: impl FnMut()) -> Result<Vec<u8>> {
        loop {
            meanwhile();
            if let Some(bytes) = self.transport.try_recv_any(peer, tag)? {
                return Ok(bytes);
            }
            self.check_deadline(peer)?;
            self.nap()?;
        }
    }

    /// Says goodbye, and waits for that of the others as long as there is hope.
    pub(crate) fn part(&mut self) {
        while self.transport.close().is_ok_and(|done| !done) && Instant::now() < self.deadline {
            self.waiter.wait(Some(NAP));
        }
    }

    /// Moves what can be moved, or sleeps for a moment.
    pub(crate) fn nap(&mut self) -> Result<()> {
        if !self.transport.progress()? {
            self.waiter.wait(Some(NAP));
        }
        Ok(())
    }

    fn check_deadline(&self, peer: usize) -> Result<()> {
        if Instant::now() < self.deadline {
            return Ok(());
        }
        Err(Error::Rendezvous(format!("rank {peer} did not answer in time when the ranks {}", self.purpose)))
    }
}
