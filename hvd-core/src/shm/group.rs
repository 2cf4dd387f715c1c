//! The ranks that share a segment: their counters, and how they sleep and wake each other.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};

use super::arena::Regions;
use super::form;
use super::segment::{NeedCell, PHASES, Segment};
use crate::error::{Error, Result};
use crate::transport::Transport;

/// What a rank counts: the three phases of a piece, and the rounds of the board in which it has spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Stage = 0,
    Reduce = 1,
    Copy = 2,
    Speak = 3,
}

/// A condition on the peers' counters: that `phase` is over for the first `count` pieces or rounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub phase: Phase,
    pub by: By,
    pub count: u64,
}

/// On whom a need must be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    All,
    One(usize),
    /// On any peer. Only for [`Phase::Speak`]: see [`ShmGroup::prepare_sleep`].
    Any,
}

/// What this rank remembers between polls.
#[derive(Default)]
pub(super) struct State {
    /// The number of the next operation's first piece.
    next: u64,
    /// This rank's counters. The peers see copies of them, which are never read back.
    mine: [u64; PHASES],
    /// What all peers' counters were seen to have reached.
    seen: [u64; PHASES],
    /// What the next piece of each phase, and the next or present round, waits for.
    needs: [Option<Need>; PHASES],
    /// An operation gave up its turn although it could have gone on.
    yielded: bool,
    /// An operation was dropped half-way.
    broken: bool,
}

/// The ranks of one host that share memory. Made by [`ShmGroup::form`], used by the operations of this module.
///
/// # Sleeping
///
/// Who has polled all operations in vain and has spun for a while calls [`ShmGroup::prepare_sleep`]; if that answers
/// `true`, sleeps on its transport's [`crate::transport::Waiter`]; then calls [`ShmGroup::awake`].
///
/// No wake-up is lost, by the pattern of Dekker's lock, with all four accesses sequentially consistent. The sleeper `S`
/// stores `sleeping = 1`, then loads the counters that it needs. An advancing rank `A` stores its counter, then loads
/// the flag of `S`. In the total order of these accesses either the store of `A` comes before the load by `S`, which
/// then does not sleep, or the store by `S` comes before the load of `A`, which then sees the flag (or somebody took
/// it back and rings).
///
/// `S` may need several counters, and `A` rings only when all of them have got there, so that the last of many ranks
/// wakes the sleeper, once. Of the stores that `S` needs and did not see, let `A`'s be the last in the total order:
/// when `A` then loads the other counters it finds each of them advanced, and rings. If what `A` reads of `S`'s needs
/// is not what `S` needs now, `S` has been awake since `A` loaded the flag; then its present check comes after the
/// store of `A`, and sees it. A ring too many only makes `S` poll once in vain.
///
/// A rank that has nothing to say joins a round only for the others' sake, and mostly they need not wait for that: soon
/// it will have something to say. So who begins a round rings nobody. Only when it has spun in vain and goes to sleep
/// itself does it ring those who sleep and have not joined. A rank that goes to sleep between rounds stays awake if
/// somebody has begun *and sleeps*. Again each of the two stores its own flag `sleeping` first and then loads the
/// other's, so at least one of them sees the other asleep.
pub struct ShmGroup {
    rank: usize,
    size: usize,
    segment: Segment,
    state: Mutex<State>,
    /// What this rank has handed out of its arena.
    pub(super) regions: Mutex<Regions>,
}

impl ShmGroup {
    /// Tries to share memory between all ranks of the transport's world; to be called by all of them at once.
    ///
    /// Each rank gets a slot of `slot_bytes` (rank 0's wish counts) for each of [`super::PIECES`] pieces. Gives `None`
    /// on all ranks if any of them cannot take part: it is on another host, in another network namespace, of another
    /// user, or out of memory.
    ///
    /// # Errors
    /// A lost peer, or [`Error::Rendezvous`] if a peer has not taken part before `deadline`.
    pub fn form(transport: &mut dyn Transport, slot_bytes: usize, deadline: Instant) -> Result<Option<Arc<ShmGroup>>> {
        let segment = form::share(transport, slot_bytes, deadline)?;
        let (rank, size) = (transport.rank(), transport.size());
        Ok(segment.map(|segment| {
            Arc::new(ShmGroup { rank, size, segment, state: Mutex::default(), regions: Mutex::default() })
        }))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Bytes of one piece at most.
    pub fn slot_bytes(&self) -> usize {
        self.segment.slot_bytes()
    }

    /// Announces that this rank goes to sleep until what its operations and its board wait for has come, and calls
    /// sleeping peers to the round under way. `false`: it has come already, poll again. Counts what the last polls
    /// found, so all operations under way must have been polled.
    ///
    /// # Errors
    /// A lost peer.
    pub fn prepare_sleep(&self, transport: &mut dyn Transport) -> Result<bool> {
        let mut state = self.lock();
        if std::mem::take(&mut state.yielded) || state.broken {
            return Ok(false);
        }
        let control = self.segment.control(self.rank);
        for (cell, need) in control.needs.iter().zip(&state.needs) {
            cell.publish(need.as_ref());
        }
        control.sleeping.0.store(1, SeqCst);
        let ready = state.needs.iter().flatten().any(|need| self.has(need));
        if ready {
            control.sleeping.0.store(0, SeqCst);
            return Ok(false);
        }
        self.call_to_round(&state, transport)?;
        Ok(true)
    }

    /// Wakes those who sleep and have not spoken in the round that this rank has.
    fn call_to_round(&self, state: &State, transport: &mut dyn Transport) -> Result<()> {
        let Some(Need { by: By::All, count, .. }) = state.needs[Phase::Speak as usize] else { return Ok(()) };
        for peer in self.peers().filter(|&peer| self.counter(peer, Phase::Speak) < count) {
            self.ring(peer, transport)?;
        }
        Ok(())
    }

    /// Announces that this rank polls again, so that nobody rings in vain.
    pub fn awake(&self) {
        self.segment.control(self.rank).sleeping.0.store(0, Release);
    }

    pub(super) fn segment(&self) -> &Segment {
        &self.segment
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The numbers of an operation's pieces begin here.
    pub(super) fn take_numbers(&self, pieces: u64) -> u64 {
        let mut state = self.lock();
        let first = state.next;
        state.next += pieces;
        first
    }

    /// Whether a need is met. Acquires what the peers wrote before.
    pub(super) fn meets(&self, state: &mut State, need: &Need) -> bool {
        match need.by {
            By::One(rank) if rank == self.rank => state.mine[need.phase as usize] >= need.count,
            By::One(rank) => self.counter(rank, need.phase) >= need.count,
            By::Any => self.peers().any(|peer| self.counter(peer, need.phase) >= need.count),
            By::All => {
                let seen = &mut state.seen[need.phase as usize];
                if *seen < need.count {
                    *seen = self.least(need.phase, Some(self.rank));
                }
                *seen >= need.count && state.mine[need.phase as usize] >= need.count
            }
        }
    }

    /// Tells the peers that this rank is through with one more piece, and wakes those who slept for it.
    pub(super) fn advance(&self, state: &mut State, phase: Phase, transport: &mut dyn Transport) -> Result<()> {
        state.mine[phase as usize] += 1;
        let counter = &self.segment.control(self.rank).counters[phase as usize].0;
        counter.store(state.mine[phase as usize], SeqCst);
        for peer in self.peers() {
            if self.is_asleep(peer) && self.would_wake(peer) {
                self.ring(peer, transport)?;
            }
        }
        Ok(())
    }

    /// Wakes a peer if it sleeps; only one of those who try does it.
    fn ring(&self, peer: usize, transport: &mut dyn Transport) -> Result<()> {
        match self.is_asleep(peer) && self.segment.control(peer).sleeping.0.swap(0, SeqCst) != 0 {
            true => transport.ring(peer),
            false => Ok(()),
        }
    }

    fn is_asleep(&self, rank: usize) -> bool {
        self.segment.control(rank).sleeping.0.load(SeqCst) != 0
    }

    /// All ranks but this one.
    pub(super) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.rank;
        (0..self.size).filter(move |&rank| rank != own)
    }

    /// As [`ShmGroup::advance`], where nobody can be waiting for it.
    pub(super) fn advance_silently(&self, state: &mut State, phase: Phase) {
        state.mine[phase as usize] += 1;
        self.segment.control(self.rank).counters[phase as usize].0.store(state.mine[phase as usize], Release);
    }

    /// Whether a sleeping peer has what it needs now. Who waits for any rank to begin a round is not woken for that.
    fn would_wake(&self, peer: usize) -> bool {
        let needs = self.segment.control(peer).needs.iter().map(|cell| cell.read(self.size));
        needs.filter(|need| need.by != By::Any).any(|need| self.has(&need))
    }

    /// Whether a need is met, as the segment shows it.
    fn has(&self, need: &Need) -> bool {
        match need.by {
            By::One(rank) => self.counter(rank, need.phase) >= need.count,
            By::All => self.least(need.phase, None) >= need.count,
            By::Any => self.peers().any(|peer| self.counter(peer, need.phase) >= need.count && self.is_asleep(peer)),
        }
    }

    pub(super) fn counter(&self, rank: usize, phase: Phase) -> u64 {
        self.segment.control(rank).counters[phase as usize].0.load(SeqCst)
    }

    fn least(&self, phase: Phase, except: Option<usize>) -> u64 {
        let ranks = (0..self.size).filter(|&rank| Some(rank) != except);
        ranks.map(|rank| self.counter(rank, phase)).min().unwrap_or(u64::MAX)
    }
}

impl State {
    /// The piece whose turn it is in a phase, if it has been through the phases before on this rank.
    pub fn turn(&self, phase: Phase) -> Option<u64> {
        let piece = self.mine[phase as usize];
        let before = (phase as usize).checked_sub(1).map_or(u64::MAX, |before| self.mine[before]);
        (piece < before).then_some(piece)
    }

    /// How many pieces have been copied out on this rank.
    pub fn copied(&self) -> u64 {
        self.mine[Phase::Copy as usize]
    }

    /// Remembers what the next piece of a phase waits for.
    pub fn wait_for(&mut self, phase: Phase, need: Option<Need>) {
        self.needs[phase as usize] = need;
    }

    /// Remembers that an operation could have gone on.
    pub fn yielded(&mut self) {
        self.yielded = true;
    }

    /// Remembers that an operation ended half-way: the pieces after it can never have their turn.
    pub fn break_off(&mut self) {
        self.broken = true;
    }

    /// An error if an operation ended half-way.
    pub fn check(&self) -> Result<()> {
        let cause = || Error::ShutDown("an operation in shared memory was given up half-way".into());
        if self.broken { Err(cause()) } else { Ok(()) }
    }
}

impl NeedCell {
    fn publish(&self, need: Option<&Need>) {
        let never = Need { phase: Phase::Stage, by: By::All, count: u64::MAX };
        let Need { phase, by, count } = *need.unwrap_or(&never);
        let by = match by {
            By::All => NeedCell::ALL,
            By::Any => NeedCell::ANY,
            By::One(rank) => rank as u32,
        };
        self.counter.store(phase as u32, Relaxed);
        self.by.store(by, Relaxed);
        self.count.store(count, Release);
    }

    /// What is written here, made harmless: any rank that is none stands for all.
    fn read(&self, size: usize) -> Need {
        let count = self.count.load(Acquire);
        let phase = match self.counter.load(Relaxed) {
            0 => Phase::Stage,
            1 => Phase::Reduce,
            2 => Phase::Copy,
            _ => Phase::Speak,
        };
        let by = match self.by.load(Relaxed) {
            NeedCell::ANY => By::Any,
            rank if (rank as usize) < size => By::One(rank as usize),
            _ => By::All,
        };
        Need { phase, by, count }
    }
}
