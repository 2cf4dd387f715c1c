//! The part of the engine that serves one set of ranks: its own negotiation, cache, order and backend, so that no set waits
//! for another.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Observers;
use super::backend::Backend;
use super::cache::Agreement;
use super::entry::{Entry, Item};
use super::execute::Execution;
use super::founding::{Foundation, Members};
use super::fusion::{Batch, Ready, plan};
use super::message::{SetName, Signature};
use super::negotiation::{Negotiation, Verdict};
use super::observe::Phase;
use super::stall::Overdue;
use super::submission::{Completion, OpKind};
use super::tuner::{Tuned, Tuner};
use crate::collective::Sharing;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::Transport;
use crate::transport::subset::Subset;

/// Operations over the transport that may be under way at once.
const MAX_RUNNING: usize = 4;

/// What a set has found that is not its own matter.
#[derive(Default)]
pub(super) struct Findings {
    /// What came of sets in the making.
    pub foundations: Vec<Foundation>,
    /// What other sets wait for in vain.
    pub strays: Vec<Stray>,
}

/// A tensor that the ranks of one set wait for, and this rank has submitted in another.
pub(super) struct Stray {
    pub name: String,
    /// Where it is waited for.
    pub set: u32,
    /// Where this rank submitted it.
    pub place: SetName,
}

/// What the ranks of a set have under way, as one of them knows it.
pub(super) struct Set {
    /// 0 for the world.
    number: u32,
    negotiation: Negotiation,
    backend: Backend,
    fusion_threshold_bytes: usize,
    /// On rank 0 of the world, for the world, as long as it tunes.
    tuner: Option<Tuner>,
    /// Submitted on this rank and not yet agreed on, by name.
    waiting: HashMap<String, Entry>,
    /// Whoever waits for all ranks to join, once this one has.
    joining: Option<Entry>,
    /// Agreed on.
    ready: VecDeque<Batch>,
    running: Vec<Execution>,
    /// Whoever waits for the set to be removed.
    removal: Option<Entry>,
}

impl Set {
    /// The set `number` of `members`, of which this rank is the `rank`th. `sharing`: how they share memory.
    pub(super) fn new(
        number: u32,
        rank: usize,
        members: Arc<[usize]>,
        sharing: Sharing,
        config: &Config,
        tuner: Option<Tuner>,
    ) -> Self {
        Set {
            number,
            negotiation: Negotiation::new(rank, members.clone(), config.cache_capacity, sharing.all()),
            backend: Backend::new(rank, members, sharing, config),
            fusion_threshold_bytes: config.fusion_threshold_bytes,
            tuner,
            waiting: HashMap::new(),
            joining: None,
            ready: VecDeque::new(),
            running: Vec::new(),
            removal: None,
        }
    }

    /// Takes a submission in.
    pub(super) fn accept(&mut self, entry: Entry) {
        if let Some(refusal) = self.refusal(&entry.name) {
            return entry.refuse(refusal);
        }
        match entry.items.first().map(|item| &item.submission.kind) {
            Some(OpKind::Join) => {
                self.negotiation.join();
                self.joining = Some(entry);
            }
            _ => {
                let Some(signature) = entry.signature(&self.backend) else { return };
                self.negotiation.submit(&entry.name, signature, entry.first_dims());
                self.waiting.insert(entry.name.clone(), entry);
            }
        }
    }

    fn refusal(&self, name: &str) -> Option<&'static str> {
        if self.removal.is_some() {
            Some("this rank has removed the process set")
        } else if self.joining.is_some() {
            Some("this rank has joined; wait for the others to join")
        } else if self.waiting.contains_key(name) {
            Some("submitted before and not ready yet; names must be unique")
        } else {
            None
        }
    }

    /// Says that this rank needs the set no longer; `removal` is told once no rank does.
    pub(super) fn close(&mut self, removal: Option<Entry>) {
        self.negotiation.close();
        match removal {
            Some(again) if self.removal.is_some() => again.refuse("this rank has asked for it before"),
            Some(first) => self.removal = Some(first),
            None => {}
        }
    }

    /// Says that this rank makes a set of the world.
    pub(super) fn ask_for_set(&mut self, members: Members) {
        self.negotiation.ask_for_set(members);
    }

    /// Whether no rank needs the set any longer and nothing of it is under way.
    pub(super) fn is_closed(&self) -> bool {
        self.negotiation.all_closing() && self.ready.is_empty() && self.running.is_empty()
    }

    /// Whether anything of this rank's is under way.
    pub(super) fn is_busy(&self) -> bool {
        let waits = !self.waiting.is_empty() || self.joining.is_some() || self.removal.is_some();
        waits || !self.ready.is_empty() || !self.running.is_empty()
    }

    /// Whether messages may be under way, so that somebody must drive the transport.
    pub(super) fn needs_transport(&self) -> bool {
        self.negotiation.needs_transport() || self.running.iter().any(|execution| !execution.route().is_shared())
    }

    /// Goes on as far as it can without waiting. Gives whether anything moved; what others are to act on goes into `findings`.
    pub(super) fn step(
        &mut self,
        transport: &mut dyn Transport,
        observers: &Observers,
        findings: &mut Findings,
    ) -> Result<bool> {
        let (members, rank) = (self.backend.members.clone(), self.backend.rank);
        let mut part;
        let transport: &mut dyn Transport = match self.number {
            0 => transport,
            number => {
                part = Subset::new(transport, &members, rank, number);
                &mut part
            }
        };
        let mut moved = false;
        while let Some(verdicts) = self.negotiation.poll(transport)? {
            observers.round();
            if let Some(tuned) = self.negotiation.take_agreed() {
                self.change_settings(tuned);
            }
            self.follow(verdicts, observers, findings);
            moved = true;
        }
        Ok(self.run(transport, observers)? || moved)
    }

    /// Turns what the ranks concluded in one round into batches.
    fn follow(&mut self, verdicts: Vec<Verdict>, observers: &Observers, findings: &mut Findings) {
        let mut ready = Vec::new();
        for verdict in verdicts {
            match verdict {
                Verdict::Ready { agreement, contributors } => {
                    ready.extend(self.ready_tensors(&agreement, contributors, observers));
                }
                Verdict::Refused { name, owed, error } => {
                    self.refuse(&name, error, observers);
                    let stray = |set| Stray { name: name.clone(), set, place: self.name() };
                    findings.strays.extend(owed.into_iter().map(stray));
                }
                Verdict::Joined { last } => {
                    if let Some(entry) = self.joining.take() {
                        entry.complete(Ok(Completion::answer(last)));
                    }
                }
                Verdict::Founded(foundation) => findings.foundations.push(foundation),
            }
        }
        self.ready.extend(plan(ready, self.fusion_threshold_bytes, self.backend.segment_bytes));
    }

    fn refuse(&mut self, name: &str, error: Error, observers: &Observers) {
        if let Some(entry) = self.waiting.remove(name) {
            entry.items.iter().for_each(|item| observers.tell(&item.submission.name, Phase::Failed));
            entry.complete(Err(error));
        }
    }

    /// The tensors on which the ranks agree. Where this rank has joined, others stand in for them.
    fn ready_tensors(&mut self, agreement: &Agreement, contributors: usize, observers: &Observers) -> Vec<Ready> {
        let stand_in = || self.negotiation.has_joined().then(|| Entry::stand_in(agreement));
        let Some(entry) = self.waiting.remove(&agreement.name).or_else(stand_in) else { return Vec::new() };
        let Agreement { signature: Signature { kind, tensors, .. }, first_dims, .. } = agreement;
        let all_contribute = contributors == self.backend.size;
        let ready = |(at, mut item): (usize, Item)| {
            observers.tell(&item.submission.name, Phase::Negotiated);
            item.first_dims = first_dims.iter().filter_map(|dims| dims.get(at).map(|&dim| dim as usize)).collect();
            let in_place = all_contribute && tensors.get(at).is_some_and(|tensor| tensor.place.is_some());
            let route = self.backend.route(kind, item.submission.input.len(), in_place);
            Ready { kind: kind.clone(), route, contributors, item }
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
    fn run(&mut self, transport: &mut dyn Transport, observers: &Observers) -> Result<bool> {
        let mut moved = false;
        while self.running.len() < MAX_RUNNING && !self.running.iter().any(Execution::is_preparing) {
            let Some(batch) = self.ready.pop_front() else { break };
            self.running.push(Execution::start(batch, &mut self.backend, observers)?);
            moved = true;
        }
        let mut shared_is_taken = false;
        let mut at = 0;
        while at < self.running.len() {
            let shared = self.running[at].route().keeps_order();
            if (shared && shared_is_taken) || !self.running[at].poll(transport)? {
                shared_is_taken |= shared;
                at += 1;
                continue;
            }
            let done = self.running.remove(at);
            if self.tuner.is_some() {
                self.tune(&done.tensors());
            }
            let buffer = done.finish(observers);
            self.backend.give_buffer(buffer);
            moved = true;
        }
        Ok(moved)
    }

    /// Tells whoever waits for the set's end, and ends what only some of its ranks had submitted.
    pub(super) fn end(mut self) {
        let error = Error::ShutDown("before every rank had submitted this tensor".into());
        let waiting = self.waiting.drain().map(|(_, entry)| entry);
        waiting.chain(self.joining.take()).for_each(|entry| entry.complete(Err(error.clone())));
        if let Some(removal) = self.removal.take() {
            removal.complete(Ok(Completion::new(Memory::empty())));
        }
    }

    /// Ends everything with an error.
    pub(super) fn fail(&mut self, error: &Error) {
        self.running.drain(..).for_each(|execution| execution.fail(error));
        let ready = self.ready.drain(..).flat_map(|batch| batch.items);
        ready.for_each(|item| item.complete(Err(error.clone())));
        let waiting = self.waiting.drain().map(|(_, entry)| entry);
        let waiting = waiting.chain(self.joining.take()).chain(self.removal.take());
        waiting.for_each(|entry| entry.complete(Err(error.clone())));
    }

    /// Whether anything of this rank's waits to be agreed on.
    pub(super) fn is_waiting(&self) -> bool {
        self.negotiation.is_waiting()
    }

    /// Whether this rank wants a round.
    pub(super) fn has_news(&self) -> bool {
        self.negotiation.has_news()
    }

    /// What of this rank's has waited for `age`, and which ranks of the world lack it.
    pub(super) fn overdue(&mut self, now: Instant, age: Duration) -> Vec<Overdue> {
        let mut overdue = self.negotiation.overdue(now, age);
        for tensor in &mut overdue {
            tensor.missing.iter_mut().for_each(|rank| *rank = self.backend.members[*rank]);
        }
        overdue
    }

    /// The ranks of the world that have this tensor in this set and wait for this rank's.
    pub(super) fn wait_for_this_rank(&self, name: &str) -> Vec<usize> {
        self.negotiation.wait_for_this_rank(name).iter().map(|rank| self.backend.members[rank]).collect()
    }

    /// Tells the others that this rank has submitted in `place` what they wait for here.
    pub(super) fn say_astray(&mut self, name: &str, place: SetName) {
        self.negotiation.say_astray(name, place);
    }

    /// Notes that the set `other` is told that this rank has a tensor here. `false` if it was told before.
    pub(super) fn note_told(&mut self, name: &str, other: u32) -> bool {
        self.negotiation.note_told(name, other)
    }

    /// What it is called.
    pub(super) fn name(&self) -> SetName {
        SetName { number: self.number, members: self.backend.members.to_vec() }
    }

    /// Announces to the ranks that share memory with this one that it will sleep. `false` if it must not yet.
    pub(super) fn prepare_sleep(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        if let Some(hosts) = &self.backend.hosts {
            return hosts.prepare_sleep(transport);
        }
        let Some(group) = self.backend.shared.clone() else { return Ok(true) };
        match self.number {
            0 => group.prepare_sleep(transport),
            number => {
                let members = self.backend.members.clone();
                group.prepare_sleep(&mut Subset::new(transport, &members, self.backend.rank, number))
            }
        }
    }

    /// Announces that this rank is awake.
    pub(super) fn awake(&self) {
        let group = self.backend.shared.as_ref().or_else(|| self.backend.hosts.as_ref()?.group());
        if let Some(group) = group {
            group.awake();
        }
    }
}
