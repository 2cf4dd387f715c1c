//! Rounds of negotiation by messages: every rank hears what every other rank says.
//!
//! Dissemination (Hensgen, Finkel and Manber, 1988): in step *k* rank *r* sends all it has heard to rank *r + 2ᵏ* and hears
//! from rank *r − 2ᵏ*. After ⌈log₂ n⌉ steps all ranks have heard of all, for any n, because merging the same thing twice
//! changes nothing. A rank with nothing to say joins as soon as it hears that somebody began; so that this news, too, takes
//! only log₂ n hops, who joins sends an empty message ahead on the ways of the later steps.

use std::collections::VecDeque;

use super::message::RoundMessage;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::subset::channel;
use crate::transport::{Request, Tag, Transport};

/// One channel for each step.
const CHANNEL: u32 = channel::NEGOTIATION;

/// The rounds of one world, seen from one rank.
pub struct Dissemination {
    rank: usize,
    size: usize,
    /// Number of the current round; wraps around.
    round: u32,
    /// `None` between rounds, else the step that is waited for and what has been heard so far.
    active: Option<(usize, RoundMessage)>,
    /// What arrived ahead of its step.
    early: Vec<VecDeque<Vec<u8>>>,
    /// Sends that still hold their memory.
    sends: Vec<Request>,
}

impl Dissemination {
    /// Before the first round.
    pub fn new(rank: usize, size: usize) -> Self {
        let steps = size.next_power_of_two().trailing_zeros() as usize;
        let early = vec![VecDeque::new(); steps];
        Dissemination { rank, size, round: 0, active: None, early, sends: Vec::new() }
    }

    /// Whether a round is under way.
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// Whether it is time to [`Dissemination::begin`]: no round is under way, and this rank wants one or another rank began
    /// one.
    pub fn is_due(&mut self, transport: &mut dyn Transport, wanted: bool) -> Result<bool> {
        self.forget_sent(transport)?;
        Ok(!self.is_active() && (wanted || self.somebody_began(transport)?))
    }

    /// Begins or joins a round with what this rank has to say.
    pub fn begin(&mut self, transport: &mut dyn Transport, own: RoundMessage) -> Result<()> {
        for step in 1..self.early.len() {
            self.send(transport, step, Vec::new())?;
        }
        self.send_heard(transport, 0, &own)?;
        self.active = Some((0, own));
        Ok(())
    }

    /// Goes on as far as it can; gives what was said once the round is complete.
    pub fn advance(&mut self, transport: &mut dyn Transport) -> Result<Option<RoundMessage>> {
        while let Some((step, mut heard)) = self.active.take() {
            let Some(bytes) = self.receive(transport, step)? else {
                self.active = Some((step, heard));
                return Ok(None);
            };
            heard.merge(RoundMessage::decode(&bytes, self.size).map_err(|detail| self.violation(step, detail))?);
            if step + 1 == self.early.len() {
                self.round = self.round.wrapping_add(1);
                return Ok(Some(heard));
            }
            self.send_heard(transport, step + 1, &heard)?;
            self.active = Some((step + 1, heard));
        }
        Ok(None)
    }

    /// The message of a step, without the empty one that ran ahead of it.
    fn receive(&mut self, transport: &mut dyn Transport, step: usize) -> Result<Option<Vec<u8>>> {
        loop {
            let bytes = match self.early[step].pop_front() {
                Some(bytes) => bytes,
                None => match transport.try_recv_any(self.source(step), self.tag(step))? {
                    Some(bytes) => bytes,
                    None => return Ok(None),
                },
            };
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
    }

    fn somebody_began(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        for step in 0..self.early.len() {
            if let Some(bytes) = transport.try_recv_any(self.source(step), self.tag(step))? {
                self.early[step].push_back(bytes);
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn send_heard(&mut self, transport: &mut dyn Transport, step: usize, heard: &RoundMessage) -> Result<()> {
        let bytes = heard.encode().map_err(|detail| self.violation(step, detail))?;
        self.send(transport, step, bytes)
    }

    fn send(&mut self, transport: &mut dyn Transport, step: usize, bytes: Vec<u8>) -> Result<()> {
        let peer = (self.rank + (1 << step)) % self.size;
        let request = transport.send(peer, self.tag(step), Memory::from_vec(bytes))?;
        self.sends.push(request);
        Ok(())
    }

    fn forget_sent(&mut self, transport: &mut dyn Transport) -> Result<()> {
        let mut failed = Ok(());
        self.sends.retain(|&request| match transport.test(request) {
            Ok(done) => !done,
            Err(error) => {
                failed = Err(error);
                false
            }
        });
        failed
    }

    fn source(&self, step: usize) -> usize {
        (self.rank + self.size - (1 << step)) % self.size
    }

    fn tag(&self, step: usize) -> Tag {
        Tag { channel: CHANNEL + step as u32, sequence: self.round }
    }

    fn violation(&self, step: usize, detail: String) -> Error {
        Error::Protocol { peer: format!("rank {}", self.source(step)), detail }
    }
}
