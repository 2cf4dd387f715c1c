//! The ranks that share a segment: their counters, and how they sleep and wake each other.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::form;
use super::segment::{NeedCell, Segment};
use crate::error::{Error, Result};
use crate::transport::Transport;

/// The three phases of a piece, each with a counter per rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Stage = 0,
    Reduce = 1,
    Copy = 2,
}

/// A condition on the peers' counters: that `phase` is over for the first `count` pieces.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub phase: Phase,
    /// On this rank; `None`: on all.
    pub by: Option<usize>,
    pub count: u64,
}

/// What this rank remembers between polls.
#[derive(Default)]
pub(super) struct State {
    /// The number of the next operation's first piece.
    next: u64,
    /// This rank's counters. The peers see copies of them, which are never read back.
    mine: [u64; 3],
    /// What all peers' counters were seen to have reached.
    seen: [u64; 3],
    /// What the next piece of each phase waits for.
    needs: [Option<Need>; 3],
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
pub struct ShmGroup {
    rank: usize,
    size: usize,
    segment: Segment,
    state: Mutex<State>,
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
        Ok(segment.map(|segment| Arc::new(ShmGroup { rank, size, segment, state: Mutex::default() })))
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

    /// Announces that this rank goes to sleep until what its operations wait for has come. `false`: it has come
    /// already, poll again. Counts what the last polls found, so all operations under way must have been polled.
    pub fn prepare_sleep(&self) -> bool {
        let mut state = self.lock();
        if std::mem::take(&mut state.yielded) || state.broken {
            return false;
        }
        let control = self.segment.control(self.rank);
        for (cell, need) in control.needs.iter().zip(&state.needs) {
            cell.publish(need.as_ref());
        }
        control.sleeping.0.store(1, SeqCst);
        let ready = state.needs.iter().flatten().any(|need| self.has(need));
        if ready {
            control.sleeping.0.store(0, SeqCst);
        }
        !ready
    }

    /// Announces that this rank polls again, so that nobody rings in vain.
    pub fn awake(&self) {
        self.segment.control(self.rank).sleeping.0.store(0, Release);
    }

    pub(super) fn segment(&self) -> &Segment {
        &self.segment
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
            Some(rank) if rank == self.rank => state.mine[need.phase as usize] >= need.count,
            Some(rank) => self.counter(rank, need.phase) >= need.count,
            None => {
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
        for peer in (0..self.size).filter(|&peer| peer != self.rank) {
            let sleeping = &self.segment.control(peer).sleeping.0;
            if sleeping.load(SeqCst) != 0 && self.would_wake(peer) && sleeping.swap(0, SeqCst) != 0 {
                transport.ring(peer)?;
            }
        }
        Ok(())
    }

    /// As [`ShmGroup::advance`], where nobody can be waiting for it.
    pub(super) fn advance_silently(&self, state: &mut State, phase: Phase) {
        state.mine[phase as usize] += 1;
        self.segment.control(self.rank).counters[phase as usize].0.store(state.mine[phase as usize], Release);
    }

    fn would_wake(&self, peer: usize) -> bool {
        self.segment.control(peer).needs.iter().any(|cell| self.has(&cell.read(self.size)))
    }

    /// Whether a need is met, as the segment shows it.
    fn has(&self, need: &Need) -> bool {
        match need.by {
            Some(rank) => self.counter(rank, need.phase) >= need.count,
            None => self.least(need.phase, None) >= need.count,
        }
    }

    fn counter(&self, rank: usize, phase: Phase) -> u64 {
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
        let (phase, by, count) = need.map_or((Phase::Stage, None, u64::MAX), |need| (need.phase, need.by, need.count));
        self.counter.store(phase as u32, Relaxed);
        self.by.store(by.map_or(NeedCell::ALL, |rank| rank as u32), Relaxed);
        self.count.store(count, Release);
    }

    /// What is written here, made harmless: any rank that is none stands for all.
    fn read(&self, size: usize) -> Need {
        let count = self.count.load(Acquire);
        let phase = match self.counter.load(Relaxed) {
            0 => Phase::Stage,
            1 => Phase::Reduce,
            _ => Phase::Copy,
        };
        let by = Some(self.by.load(Relaxed) as usize).filter(|&rank| rank < size);
        Need { phase, by, count }
    }
}
