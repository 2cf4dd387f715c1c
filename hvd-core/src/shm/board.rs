//! The board: in each round every rank says something, and hears what all others say.

use std::sync::Arc;

use super::group::{By, Need, Phase, ShmGroup};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::subset::channel;
use crate::transport::{MAX_MESSAGE_BYTES, Request, Tag, Transport};

/// The channel of what is too long for the board.
const CHANNEL: u32 = channel::BOARD;
/// A page begins with the number of bytes that are said.
const HEAD: usize = size_of::<u64>();

/// Rounds in which each rank says something of any length. One board for a [`ShmGroup`].
///
/// A rank writes what it says on its page of the round, then counts up [`Phase::Speak`]; it reads the others' pages once
/// they have done so. Who speaks in round `k + 1` has seen all speak in round `k`, hence has read all of round `k - 1`: so two
/// pages, used in turns, are never written while somebody may read them. For what does not fit on its page a rank
/// writes only the length there, and sends the rest as a message to each.
pub struct ShmBoard {
    group: Arc<ShmGroup>,
    /// The round that is under way or comes next; the first is 1.
    round: u64,
    /// The peers that were not heard in this round.
    unheard: Vec<usize>,
    /// What a peer said, copied before it is read.
    heard: Vec<u8>,
    /// Sends that still hold their memory.
    sends: Vec<Request>,
    /// A peer that has spoken sends a message that is on its way.
    receiving: bool,
}

impl ShmBoard {
    /// Before the first round. The group must not have had a board before.
    pub fn new(group: Arc<ShmGroup>) -> ShmBoard {
        let board =
            ShmBoard { group, round: 1, unheard: Vec::new(), heard: Vec::new(), sends: Vec::new(), receiving: false };
        board.wait_for(By::Any);
        board
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.group.size()
    }

    /// Whether messages are under way, so that somebody must drive the transport.
    pub fn needs_transport(&self) -> bool {
        self.receiving || !self.sends.is_empty()
    }

    /// Whether a peer has spoken in the round that comes next.
    ///
    /// # Errors
    /// A lost peer.
    pub fn somebody_began(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.forget_sent(transport)?;
        Ok(self.group.peers().any(|peer| self.group.counter(peer, Phase::Speak) >= self.round))
    }

    /// Speaks in the round that is under way or comes next. Once in a round.
    ///
    /// # Errors
    /// A lost peer.
    pub fn say(&mut self, transport: &mut dyn Transport, bytes: Vec<u8>) -> Result<()> {
        self.unheard.extend(self.group.peers());
        let page = self.group.segment().board(self.group.rank(), self.round);
        // SAFETY: the page is this rank's to write, and nobody reads it any more (see above).
        let page = unsafe { &mut *page };
        page[..HEAD].copy_from_slice(&(bytes.len() as u64).to_ne_bytes());
        match page[HEAD..].get_mut(..bytes.len()) {
            Some(room) => room.copy_from_slice(&bytes),
            None => self.send_to_all(transport, bytes)?,
        }
        self.wait_for(By::All);
        self.group.advance(&mut self.group.lock(), Phase::Speak, transport)
    }

    /// Calls `take` with what each peer says, once for each and in any order, as far as they have spoken. `true` once the
    /// round, in which this rank has spoken, is complete.
    ///
    /// # Errors
    /// A lost peer, one that breaks the protocol, and whatever `take` gives.
    pub fn hear(
        &mut self,
        transport: &mut dyn Transport,
        mut take: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<bool> {
        let (mut at, mut receiving) = (0, false);
        while at < self.unheard.len() {
            let peer = self.unheard[at];
            let spoken = self.group.counter(peer, Phase::Speak) >= self.round;
            if spoken && self.read(peer, transport)? {
                take(peer, &self.heard)?;
                self.unheard.swap_remove(at);
            } else {
                receiving |= spoken;
                at += 1;
            }
        }
        self.forget_sent(transport)?;
        if self.unheard.is_empty() {
            (self.round, self.receiving) = (self.round + 1, false);
            self.wait_for(By::Any);
            return Ok(true);
        }
        if receiving != std::mem::replace(&mut self.receiving, receiving) {
            self.wait_for(By::All);
        }
        Ok(false)
    }

    /// Copies what a peer has said in this round. `false` if it is still on its way.
    fn read(&mut self, peer: usize, transport: &mut dyn Transport) -> Result<bool> {
        let page = self.group.segment().board(peer, self.round);
        // SAFETY: the peer has written its page before it counted up, and writes it again only after this rank has
        // spoken in the next round.
        let page = unsafe { &*page };
        let (head, room) = page.split_at(HEAD);
        let length = u64::from_ne_bytes(head.try_into().unwrap_or_default());
        if length > MAX_MESSAGE_BYTES as u64 {
            let detail = format!("{length} bytes in one round of negotiation");
            return Err(Error::Protocol { peer: format!("rank {peer}"), detail });
        }
        self.heard.clear();
        if let Some(bytes) = room.get(..length as usize) {
            self.heard.extend_from_slice(bytes);
            return Ok(true);
        }
        let message = transport.try_recv_any(peer, self.tag())?;
        Ok(message.map(|message| self.heard = message).is_some())
    }

    fn send_to_all(&mut self, transport: &mut dyn Transport, bytes: Vec<u8>) -> Result<()> {
        let bytes = Memory::from_vec(bytes);
        for peer in self.group.peers() {
            self.sends.push(transport.send(peer, self.tag(), bytes.clone())?);
        }
        Ok(())
    }

    fn forget_sent(&mut self, transport: &mut dyn Transport) -> Result<()> {
        while let Some(&request) = self.sends.last()
            && transport.test(request)?
        {
            self.sends.pop();
        }
        Ok(())
    }

    fn tag(&self) -> Tag {
        Tag { channel: CHANNEL, sequence: self.round as u32 }
    }

    /// Notes what a sleep may wait for: that all, or any, speak in this round. A message on its way wakes by itself.
    fn wait_for(&self, by: By) {
        let need = Need { phase: Phase::Speak, by, count: self.round };
        self.group.lock().wait_for(Phase::Speak, (!self.receiving).then_some(need));
    }
}
