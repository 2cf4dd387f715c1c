//! One round of negotiation: every rank hears what every other rank says, one round at a time.

use std::sync::Arc;

use super::dissemination::Dissemination;
use super::message::RoundMessage;
use crate::error::{Error, Result};
use crate::shm::{ShmBoard, ShmGroup};
use crate::transport::Transport;

/// The rounds of one group of ranks, seen from one of them.
pub enum Exchange {
    /// By messages, in ⌈log₂ n⌉ steps.
    Messages(Dissemination),
    /// Over a board in the memory that the ranks share, in one step and, where little is said, without a message.
    Board {
        /// Where the ranks write.
        board: ShmBoard,
        /// What this rank said and has heard so far, while a round is under way.
        active: Option<RoundMessage>,
    },
}

impl Exchange {
    /// Before the first round.
    pub fn new(rank: usize, size: usize, shared: Option<&Arc<ShmGroup>>) -> Self {
        match shared {
            Some(group) => Exchange::Board { board: ShmBoard::new(group.clone()), active: None },
            None => Exchange::Messages(Dissemination::new(rank, size)),
        }
    }

    /// Whether messages may be under way, so that somebody must drive the transport.
    pub fn needs_transport(&self) -> bool {
        match self {
            Exchange::Messages(_) => true,
            Exchange::Board { board, .. } => board.needs_transport(),
        }
    }

    /// Whether it is time to [`Exchange::begin`]: no round is under way, and this rank wants one or another rank began one.
    pub fn is_due(&mut self, transport: &mut dyn Transport, wanted: bool) -> Result<bool> {
        match self {
            Exchange::Messages(rounds) => rounds.is_due(transport, wanted),
            Exchange::Board { board, active } => Ok(active.is_none() && (wanted || board.somebody_began(transport)?)),
        }
    }

    /// Begins or joins a round with what this rank has to say.
    pub fn begin(&mut self, transport: &mut dyn Transport, own: RoundMessage) -> Result<()> {
        match self {
            Exchange::Messages(rounds) => rounds.begin(transport, own),
            Exchange::Board { board, active } => {
                let bytes = own.encode().map_err(Error::Invalid)?;
                *active = Some(own);
                board.say(transport, bytes)
            }
        }
    }

    /// Goes on as far as it can; gives what was said once the round is complete.
    pub fn advance(&mut self, transport: &mut dyn Transport) -> Result<Option<RoundMessage>> {
        match self {
            Exchange::Messages(rounds) => rounds.advance(transport),
            Exchange::Board { board, active } => {
                let Some(heard) = active else { return Ok(None) };
                let size = board.size();
                let complete = board.hear(transport, |peer, bytes| {
                    let violation = |detail| Error::Protocol { peer: format!("rank {peer}"), detail };
                    RoundMessage::decode(bytes, size).map(|message| heard.merge(message)).map_err(violation)
                })?;
                Ok(if complete { active.take() } else { None })
            }
        }
    }
}
