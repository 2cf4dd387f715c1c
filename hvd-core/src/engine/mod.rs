//! Negotiates, fuses and executes what is submitted, in the background or on the thread that waits.
//!
//! The engine is a state machine ([`Core`]) behind a lock. Whoever holds the lock drives it; nothing moves by a clock.

mod cache;
mod dissemination;
mod drive;
mod exchange;
mod execute;
mod fusion;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod message;
mod negotiation;
pub mod observe;
pub mod simulation;
mod staging;
mod stall;
pub mod submission;
pub mod timeline;
mod tuner;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::cache::Agreement;
use self::execute::Execution;
use self::fusion::{Batch, Ready, Route, plan};
use self::message::{Signature, SignatureKind};
use self::negotiation::{Negotiation, Verdict};
use self::observe::Phase;
use self::stall::{Complaint, StallInspector};
use self::submission::{Completion, OpKind, Output, Promise, Submission};
use self::tuner::{Tuned, Tuner};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::shm::{DIRECT_BYTES, Place, ShmGroup};
use crate::transport::{Tag, Transport};

pub use drive::{Engine, GroupHandle, Handle};
pub(crate) use observe::Observers;

/// Operations over the transport that may be under way at once.
const MAX_RUNNING: usize = 4;
/// How often the transport is looked at while nothing moves through it.
const STEPS_PER_LOOK: u32 = 64;

/// A tensor and whoever waits for it.
pub(crate) struct Item {
    submission: Submission,
    promise: Promise,
    /// Of an allgather that was agreed on: each rank's first dimension.
    first_dims: Vec<usize>,
}

/// What is negotiated as one: a tensor, or the tensors of a group, which are of one kind.
pub(crate) struct Entry {
    name: String,
    items: Vec<Item>,
}

impl Entry {
    fn signature(&self, backend: &Backend) -> Option<Signature> {
        let place = |submission: &Submission| backend.place(submission);
        Signature::of(self.items.iter().map(|item| &item.submission), backend.size, place)
    }

    /// Of an allgather: this rank's first dimension of each tensor.
    fn first_dims(&self) -> Vec<u64> {
        let first_dim = |item: &Item| match item.submission.kind {
            OpKind::Allgather => item.submission.shape.first().map(|&dim| dim as u64),
            _ => None,
        };
        self.items.iter().filter_map(first_dim).collect()
    }

    fn complete(self, result: Result<Completion>) {
        self.items.into_iter().for_each(|item| item.complete(result.clone()));
    }
}

/// What carries out collectives for one world, and the numbers it needs.
pub(crate) struct Backend {
    rank: usize,
    size: usize,
    /// The memory that all ranks share, if they are on one host.
    shared: Option<Arc<ShmGroup>>,
    segment_bytes: usize,
    doubling_limit_bytes: usize,
    /// Numbers the operations, so that their messages do not meet.
    sequence: u32,
    /// A buffer of a batch that is done, for the next.
    spare: Option<Memory>,
}

impl Backend {
    fn new(transport: &dyn Transport, shared: Option<Arc<ShmGroup>>, config: &Config) -> Self {
        Backend {
            rank: transport.rank(),
            size: transport.size(),
            shared,
            segment_bytes: config.segment_bytes,
            doubling_limit_bytes: config.doubling_limit_bytes,
            sequence: 0,
            spare: None,
        }
    }

    fn route(&self, kind: &SignatureKind, bytes: usize, in_place: bool) -> Route {
        match kind {
            _ if in_place => Route::InPlace,
            SignatureKind::Allreduce(options) if !options.op.is_elementwise() => Route::Ring,
            _ if self.shared.is_some() => Route::Shared,
            SignatureKind::Allreduce(_) if bytes <= self.doubling_limit_bytes => Route::Doubling,
            _ => Route::Ring,
        }
    }

    /// Where a tensor lies that can be reduced in place: in a buffer that the ranks share, and as it travels.
    fn place(&self, submission: &Submission) -> Option<Place> {
        let group = self.shared.as_ref()?;
        let (OpKind::Allreduce(options), Output::InPlace) = (&submission.kind, &submission.output) else { return None };
        let plain = options.prescale == 1.0 && options.compression.wire_dtype(submission.dtype) == submission.dtype;
        let small = submission.input.len().saturating_mul(self.size) <= DIRECT_BYTES;
        if plain && options.op.is_elementwise() && !small { group.place(&submission.input) } else { None }
    }

    fn next_tag(&mut self) -> Tag {
        self.sequence = self.sequence.wrapping_add(1);
        Tag { channel: 0, sequence: self.sequence }
    }

    fn take_buffer(&mut self) -> Option<Memory> {
        self.spare.take()
    }
}

/// All that one rank's engine knows.
pub(crate) struct Core {
    transport: Box<dyn Transport>,
    negotiation: Negotiation,
    backend: Backend,
    fusion_threshold_bytes: usize,
    observers: Arc<Observers>,
    stall: StallInspector,
    /// On rank 0, as long as it tunes.
    tuner: Option<Tuner>,
    /// Submitted on this rank and not yet agreed on, by name.
    waiting: HashMap<String, Entry>,
    /// Agreed on.
    ready: VecDeque<Batch>,
    running: Vec<Execution>,
    /// Steps since the last look at the transport.
    unlooked: u32,
    state: State,
}

/// The life of an engine.
#[derive(Clone, Debug)]
pub(crate) enum State {
    /// Serving.
    Open,
    /// All ranks want to shut down; the transport says goodbye.
    Closing,
    /// Shut down in agreement.
    Closed,
    /// Lost.
    Failed(Error),
}

impl Core {
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        shared: Option<Arc<ShmGroup>>,
        config: &Config,
        observers: Arc<Observers>,
    ) -> Result<Self> {
        let tuner = match transport.rank() {
            0 => Tuner::new(config, shared.is_some())?,
            _ => None,
        };
        Ok(Core {
            negotiation: Negotiation::new(transport.rank(), transport.size(), config.cache_capacity, shared.as_ref()),
            backend: Backend::new(&*transport, shared, config),
            fusion_threshold_bytes: config.fusion_threshold_bytes,
            transport,
            observers,
            stall: StallInspector::new(&config.stall),
            tuner,
            waiting: HashMap::new(),
            ready: VecDeque::new(),
            running: Vec::new(),
            unlooked: 0,
            state: State::Open,
        })
    }

    /// Why nothing more can be submitted, if that is so.
    pub(crate) fn ended(&self) -> Option<Error> {
        match &self.state {
            State::Open => None,
            State::Closing | State::Closed => Some(Error::ShutDown("every rank asked for it".into())),
            State::Failed(error) => Some(error.clone()),
        }
    }

    /// What the world was lost to, if it was.
    pub(crate) fn failure(&self) -> Option<Error> {
        match &self.state {
            State::Failed(error) => Some(error.clone()),
            State::Open | State::Closing | State::Closed => None,
        }
    }

    /// Whether the engine will never do anything again.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, State::Closed | State::Failed(_))
    }

    /// Whether anything of this rank's is under way, the goodbye included.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self.state, State::Closing)
            || !self.waiting.is_empty()
            || !self.ready.is_empty()
            || !self.running.is_empty()
    }

    /// Takes a submission in.
    pub(crate) fn accept(&mut self, entry: Entry) {
        if let Some(error) = self.ended() {
            return entry.complete(Err(error));
        }
        let name = entry.name.clone();
        if self.waiting.contains_key(&name) {
            let text = format!("`{name}` was submitted before and is not ready yet; names must be unique");
            return entry.complete(Err(Error::Invalid(text)));
        }
        let Some(signature) = entry.signature(&self.backend) else { return };
        self.negotiation.submit(&name, signature, entry.first_dims());
        self.waiting.insert(name, entry);
    }

    /// Says that this rank wants to shut down.
    pub(crate) fn close(&mut self) {
        if matches!(self.state, State::Open) {
            self.negotiation.close();
        }
    }

    /// Goes on as far as it can without waiting. Gives whether anything moved. An error has already reached every
    /// operation and every peer.
    pub(crate) fn step(&mut self) -> bool {
        if self.is_over() {
            return false;
        }
        match self.try_step() {
            Ok(moved) => moved,
            Err(error) => {
                self.fail(error);
                true
            }
        }
    }

    fn try_step(&mut self) -> Result<bool> {
        let mut moved = self.look_at_transport()?;
        if let State::Closing = self.state {
            if self.transport.close()? {
                self.state = State::Closed;
                moved = true;
            }
            return Ok(moved);
        }
        while let Some(verdicts) = self.negotiation.poll(&mut *self.transport)? {
            self.observers.round();
            if let Some(tuned) = self.negotiation.take_agreed() {
                self.change_settings(tuned);
            }
            self.follow(verdicts);
            moved = true;
        }
        moved |= self.run()?;
        if self.negotiation.all_closing() && self.ready.is_empty() && self.running.is_empty() {
            self.state = State::Closing;
            let error = Error::ShutDown("before every rank had submitted this tensor".into());
            self.waiting.drain().for_each(|(_, entry)| entry.complete(Err(error.clone())));
            moved = true;
        }
        Ok(moved)
    }

    /// Moves messages. Where all goes through shared memory nothing but a sleeper's ring or a peer's end is expected, so
    /// a look is taken now and then only: it is a system call.
    fn look_at_transport(&mut self) -> Result<bool> {
        let running = self.running.iter().any(|execution| !execution.route().is_shared());
        self.unlooked += 1;
        if self.unlooked < STEPS_PER_LOOK && !running && !self.negotiation.needs_transport() {
            return Ok(false);
        }
        self.unlooked = 0;
        self.transport.progress()
    }

    /// Turns what the ranks concluded in one round into batches.
    fn follow(&mut self, verdicts: Vec<Verdict>) {
        let mut ready = Vec::new();
        for verdict in verdicts {
            match verdict {
                Verdict::Refused { name, error } => {
                    if let Some(entry) = self.waiting.remove(&name) {
                        let tensors = entry.items.iter().map(|item| &item.submission.name);
                        tensors.for_each(|name| self.observers.tell(name, Phase::Failed));
                        entry.complete(Err(error));
                    }
                }
                Verdict::Ready(agreement) => {
                    if let Some(entry) = self.waiting.remove(&agreement.name) {
                        ready.extend(self.ready_tensors(entry, agreement));
                    }
                }
            }
        }
        self.ready.extend(plan(ready, self.fusion_threshold_bytes, self.backend.segment_bytes));
    }

    /// The tensors of an entry on which the ranks agree.
    fn ready_tensors(&self, entry: Entry, agreement: Agreement) -> Vec<Ready> {
        let Agreement { signature: Signature { kind, tensors, .. }, first_dims, .. } = agreement;
        let ready = |(at, mut item): (usize, Item)| {
            self.observers.tell(&item.submission.name, Phase::Negotiated);
            item.first_dims = first_dims.iter().filter_map(|dims| dims.get(at).map(|&dim| dim as usize)).collect();
            let in_place = tensors.get(at).is_some_and(|tensor| tensor.place.is_some());
            let route = self.backend.route(&kind, item.submission.input.len(), in_place);
            Ready { kind: kind.clone(), route, item }
        };
        entry.items.into_iter().enumerate().map(ready).collect()
    }

    /// What is planned from now on follows other settings, on all ranks.
    fn change_settings(&mut self, tuned: Tuned) {
        let Tuned { fusion_threshold_bytes, segment_bytes, doubling_limit_bytes } = tuned;
        self.fusion_threshold_bytes = fusion_threshold_bytes as usize;
        self.backend.segment_bytes = segment_bytes as usize;
        self.backend.doubling_limit_bytes = doubling_limit_bytes as usize;
        if let Some(tuner) = &mut self.tuner {
            tuner.applied(Instant::now());
        }
    }

    /// Tells the tuner what is about to be completed, and all ranks what the tuner asks for.
    fn tune(&mut self, tensors: &[(String, usize)]) {
        let Some(tuner) = &mut self.tuner else { return };
        let now = Instant::now();
        let change = tensors.iter().find_map(|(name, bytes)| tuner.reduced(name, *bytes, now));
        if let Some((tuned, goes_on)) = change {
            self.negotiation.propose(tuned);
            self.tuner = self.tuner.take().filter(|_| goes_on);
        }
    }

    /// Starts what is ready and polls what is running. Several operations may be under way over the transport; those in
    /// shared memory go one after the other.
    fn run(&mut self) -> Result<bool> {
        let mut moved = false;
        while self.running.len() < MAX_RUNNING && !self.running.iter().any(Execution::is_preparing) {
            let Some(batch) = self.ready.pop_front() else { break };
            self.running.push(Execution::start(batch, &mut self.backend, &self.observers)?);
            moved = true;
        }
        let mut shared_is_taken = false;
        let mut at = 0;
        while at < self.running.len() {
            let shared = self.running[at].route().is_shared();
            if (shared && shared_is_taken) || !self.running[at].poll(&mut *self.transport)? {
                shared_is_taken |= shared;
                at += 1;
                continue;
            }
            let done = self.running.remove(at);
            if self.tuner.is_some() {
                self.tune(&done.tensors());
            }
            let buffer = done.finish(&self.observers);
            self.backend.spare = buffer.or(self.backend.spare.take());
            moved = true;
        }
        Ok(moved)
    }

    /// Ends everything with `error` and tells the peers.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.is_over() {
            return;
        }
        self.state = State::Failed(error.clone());
        match &error {
            // The peers wrap the cause in the same error.
            Error::PeerLost { rank, cause } if *rank == self.backend.rank => self.transport.abort(cause),
            error => self.transport.abort(&error.to_string()),
        }
        self.running.drain(..).for_each(|execution| execution.fail(&error));
        let ready = self.ready.drain(..).flat_map(|batch| batch.items);
        let waiting = self.waiting.drain().flat_map(|(_, entry)| entry.items);
        ready.chain(waiting).for_each(|item| item.complete(Err(error.clone())));
    }

    /// Looks, from time to time, for tensors that wait in vain, and says so. Gives how long the engine may sleep if nothing
    /// happens; `None` for as long as it likes.
    ///
    /// # Errors
    /// [`Error::Stalled`], which is to end the world.
    pub(crate) fn inspect(&mut self) -> Result<Option<Duration>> {
        if !self.negotiation.is_waiting() {
            return Ok(None);
        }
        let now = Instant::now();
        if let Some(age) = self.stall.look(now) {
            let overdue = self.negotiation.overdue(now, age);
            match self.stall.judge(now, overdue) {
                Complaint::None => {}
                Complaint::Warning(text) => tracing::warn!("{text}"),
                Complaint::Failure(text) => return Err(Error::Stalled(text)),
            }
        }
        Ok(if self.negotiation.has_news() { Some(Duration::ZERO) } else { self.stall.pause(now) })
    }

    /// Whether what is under way waits for a slow link.
    pub(crate) fn is_streaming(&self) -> bool {
        self.transport.is_streaming()
    }

    /// Announces to the ranks that share memory with this one that it will sleep. `false` if it must not yet.
    pub(crate) fn prepare_sleep(&mut self) -> bool {
        let Some(group) = self.backend.shared.clone().filter(|_| !self.is_over()) else { return true };
        group.prepare_sleep(&mut *self.transport).unwrap_or_else(|error| {
            self.fail(error);
            false
        })
    }

    /// Announces that this rank is awake. `rung`: something may have come over the transport.
    pub(crate) fn awake(&mut self, rung: bool) {
        if rung {
            self.unlooked = STEPS_PER_LOOK;
        }
        if let Some(group) = &self.backend.shared {
            group.awake();
        }
    }
}
