//! Drives an operation's pieces through their phases.

use std::sync::Arc;

use super::group::{By, Need, Phase, ShmGroup, State};
use super::segment::PIECES;
use crate::error::Result;
use crate::transport::Transport;

/// How many pieces' phases one poll runs at most, so that its caller can look after other things.
const STEPS_PER_POLL: usize = 64;
/// How often a poll looks for its peers before it gives up. A look takes some tens of nanoseconds.
const LOOKS_PER_POLL: usize = 32;

/// What an operation does in each phase of a piece; `piece` is its number, `index` counts within the operation.
pub(super) trait Plan: Send {
    /// Who writes into its slots.
    fn writers(&self) -> Writers;

    /// Whether the peers' pieces must have been reduced, not only staged, before they are copied out.
    fn reduces(&self) -> bool;

    /// Writes into this rank's slot. Called on writers only.
    fn stage(&mut self, group: &ShmGroup, piece: u64, index: u64);

    /// Combines this rank's share of all slots.
    fn reduce(&mut self, _group: &ShmGroup, _piece: u64, _index: u64) {}

    /// Takes what this rank needs out of the slots.
    fn copy(&mut self, group: &ShmGroup, piece: u64, index: u64);
}

/// Who writes into the slots of an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Writers {
    All,
    One(usize),
    /// Nothing is staged: what is reduced was there before the operation began on any rank.
    Nobody,
}

/// An operation's place in the sequence of the group's pieces.
pub(super) struct Stream {
    group: Arc<ShmGroup>,
    first: u64,
    end: u64,
    done: bool,
}

impl Stream {
    pub fn new(group: Arc<ShmGroup>, pieces: u64) -> Stream {
        let first = group.take_numbers(pieces);
        Stream { group, first, end: first + pieces, done: pieces == 0 }
    }

    /// Goes on as far as the peers allow.
    pub fn poll(&mut self, plan: &mut impl Plan, transport: &mut dyn Transport) -> Result<bool> {
        if self.done {
            return Ok(true);
        }
        let mut state = self.group.lock();
        state.check()?;
        let (mut steps, mut looks) = (0, 0);
        while state.copied() < self.end && steps < STEPS_PER_POLL && looks < LOOKS_PER_POLL {
            if self.step(&mut state, plan, transport)? {
                (steps, looks) = (steps + 1, 0);
            } else {
                looks += 1;
                std::hint::spin_loop();
            }
        }
        self.done = state.copied() >= self.end;
        if steps == STEPS_PER_POLL {
            state.yielded();
        }
        Ok(self.done)
    }

    /// Runs one phase of one piece, if any can run.
    fn step(&self, state: &mut State, plan: &mut impl Plan, transport: &mut dyn Transport) -> Result<bool> {
        for phase in [Phase::Copy, Phase::Reduce, Phase::Stage] {
            let Some(piece) = state.turn(phase).filter(|piece| (self.first..self.end).contains(piece)) else {
                continue;
            };
            let need = self.need(plan, phase, piece).filter(|need| !self.group.meets(state, need));
            state.wait_for(phase, need);
            if need.is_none() {
                self.run(state, plan, phase, piece, transport)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn need(&self, plan: &impl Plan, phase: Phase, piece: u64) -> Option<Need> {
        let all = |phase, count| Some(Need { phase, by: By::All, count });
        match phase {
            Phase::Stage if self.writes(plan) => all(Phase::Copy, (piece + 1).saturating_sub(PIECES as u64)),
            Phase::Reduce if plan.reduces() && plan.writers() != Writers::Nobody => all(Phase::Stage, piece + 1),
            Phase::Stage | Phase::Reduce | Phase::Speak => None,
            Phase::Copy if plan.reduces() => all(Phase::Reduce, piece + 1),
            Phase::Copy => match plan.writers() {
                Writers::Nobody => None,
                Writers::All => all(Phase::Stage, piece + 1),
                Writers::One(root) => Some(Need { phase: Phase::Stage, by: By::One(root), count: piece + 1 }),
            },
        }
    }

    fn writes(&self, plan: &impl Plan) -> bool {
        matches!(plan.writers(), Writers::All) || plan.writers() == Writers::One(self.group.rank())
    }

    fn run(
        &self,
        state: &mut State,
        plan: &mut impl Plan,
        phase: Phase,
        piece: u64,
        transport: &mut dyn Transport,
    ) -> Result<()> {
        let index = piece - self.first;
        match phase {
            Phase::Stage if self.writes(plan) => plan.stage(&self.group, piece, index),
            Phase::Reduce if plan.reduces() => plan.reduce(&self.group, piece, index),
            Phase::Copy => plan.copy(&self.group, piece, index),
            Phase::Stage | Phase::Reduce | Phase::Speak => {
                self.group.advance_silently(state, phase);
                return Ok(());
            }
        }
        self.group.advance(state, phase, transport)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.done {
            self.group.lock().break_off();
        }
    }
}
