//! Negotiates, fuses and executes what is submitted, in the background or on the thread that waits.
//!
//! The engine is a state machine ([`Core`]) behind a lock. Whoever holds the lock drives it; nothing moves by a clock.

mod backend;
mod cache;
mod dissemination;
mod drive;
mod entry;
mod exchange;
mod execute;
mod founding;
mod fusion;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod message;
mod messages;
mod negotiation;
pub mod observe;
mod patience;
mod set;
pub mod simulation;
mod staging;
mod stall;
pub mod submission;
pub mod timeline;
mod tuner;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::entry::{Entry, Item};
use self::founding::{Foundation, Members};
use self::messages::Messages;
use self::set::{Findings, Set, Stray};
use self::stall::{Complaint, Overdue, StallInspector};
use self::submission::Completion;
use self::tuner::Tuner;
use crate::collective::Sharing;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::shm::ShmGroup;
use crate::transport::Transport;
use crate::transport::subset::{MOST_SETS, Subset};

pub use drive::{Engine, GroupHandle, Handle};
pub(crate) use messages::Stream;
pub(crate) use observe::Observers;
pub(crate) use patience::Patience;

/// How often the transport is looked at while nothing moves through it.
const STEPS_PER_LOOK: u32 = 64;

/// The number of the world's own set.
pub(crate) const WORLD: u32 = 0;

/// What a user asks the engine for.
pub(crate) enum Demand {
    /// To carry out operations of a set.
    Submit(u32, Entry),
    /// To make a set of these ranks of the world; whoever waits is told its number.
    Found(Members, Entry),
    /// To forget a set once all its ranks ask for it.
    Remove(u32, Entry),
    /// To send or receive a message.
    Exchange(Stream, Entry),
}

/// All that one rank's engine knows.
pub(crate) struct Core {
    transport: Box<dyn Transport>,
    /// The world's, whose number is 0, and those that this rank is a member of.
    sets: BTreeMap<u32, Set>,
    messages: Messages,
    /// The set that this rank makes, and who waits for it.
    founding: Option<(Members, Entry)>,
    config: Config,
    /// Whether the ranks of a set may share memory, where they can.
    may_share: bool,
    observers: Arc<Observers>,
    stall: StallInspector,
    /// Steps since the last look at the transport.
    unlooked: u32,
    /// Whether this rank wants to shut down.
    closing: bool,
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
    /// `sharing`: how the ranks share memory. `may_share`: whether those of a process set are to try.
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        sharing: Sharing,
        may_share: bool,
        config: &Config,
        observers: Arc<Observers>,
    ) -> Result<Self> {
        let (rank, members) = (transport.rank(), (0..transport.size()).collect());
        let tuner = match rank {
            0 => Tuner::new(config, sharing.all().is_some())?,
            _ => None,
        };
        let world = Set::new(WORLD, rank, members, sharing, config, tuner);
        Ok(Core {
            transport,
            sets: BTreeMap::from([(WORLD, world)]),
            messages: Messages::default(),
            founding: None,
            config: config.clone(),
            may_share,
            observers,
            stall: StallInspector::new(&config.stall),
            unlooked: 0,
            closing: false,
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
        let engaged = self.founding.is_some() || self.messages.is_busy();
        matches!(self.state, State::Closing) || engaged || self.sets.values().any(Set::is_busy)
    }

    /// Takes a demand in.
    pub(crate) fn accept(&mut self, demand: Demand) {
        match (self.ended(), demand) {
            (Some(error), demand) => demand.complete(Err(error)),
            (None, Demand::Submit(number, entry)) => match self.sets.get_mut(&number) {
                Some(set) => set.accept(entry),
                None => entry.refuse("the process set has been removed"),
            },
            (None, Demand::Remove(number, entry)) => match self.sets.get_mut(&number) {
                Some(set) => set.close(Some(entry)),
                None => entry.refuse("the process set has been removed"),
            },
            (None, Demand::Exchange(stream, entry)) => {
                self.messages.accept(stream, self.transport.rank(), entry, self.config.segment_bytes);
            }
            (None, Demand::Found(members, entry)) => self.found(members, entry),
        }
    }

    fn found(&mut self, members: Members, entry: Entry) {
        if let Some((_, other)) = &self.founding {
            return entry.refuse(&format!("this rank is making the {}; it makes one at a time", other.name));
        }
        if let Some(world) = self.sets.get_mut(&WORLD) {
            world.ask_for_set(members.clone());
            self.founding = Some((members, entry));
        }
    }

    /// Says that this rank wants to shut down, once all its process sets have been closed by all their ranks.
    pub(crate) fn close(&mut self) {
        if matches!(self.state, State::Open) && !self.closing {
            self.closing = true;
            self.sets.range_mut(WORLD + 1..).for_each(|(_, set)| set.close(None));
            self.close_world();
        }
    }

    fn close_world(&mut self) {
        if let (true, 1, Some(world)) = (self.closing, self.sets.len(), self.sets.get_mut(&WORLD)) {
            world.close(None);
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
        let mut findings = Findings::default();
        for set in self.sets.values_mut() {
            moved |= set.step(&mut *self.transport, &self.observers, &mut findings)?;
        }
        for foundation in findings.foundations {
            self.conclude(foundation)?;
        }
        findings.strays.into_iter().for_each(|stray| self.say_astray(stray));
        moved |= self.messages.step(&mut *self.transport)?;
        Ok(self.end_closed() || moved)
    }

    /// Forgets the sets that no rank needs any longer; with the world's, says goodbye.
    fn end_closed(&mut self) -> bool {
        let closed: Vec<_> = self.sets.iter().filter(|(_, set)| set.is_closed()).map(|(number, _)| *number).collect();
        for number in &closed {
            if let Some(set) = self.sets.remove(number) {
                set.end();
            }
            match *number {
                WORLD => {
                    self.state = State::Closing;
                    self.messages.fail(&Error::ShutDown("before the message had been received".into()));
                    std::mem::take(&mut self.sets).into_values().for_each(Set::end);
                }
                _ => self.close_world(),
            }
        }
        if let (State::Closing, Some((_, entry))) = (&self.state, self.founding.take_if(|_| !closed.is_empty())) {
            entry.complete(Err(Error::ShutDown("before every rank had made this process set".into())));
        }
        !closed.is_empty()
    }

    /// Moves messages. Where all goes through shared memory nothing but a sleeper's ring or a peer's end is expected, so
    /// a look is taken now and then only: it is a system call.
    fn look_at_transport(&mut self) -> Result<bool> {
        self.unlooked += 1;
        let expected = matches!(self.state, State::Closing) || self.messages.is_busy();
        if self.unlooked < STEPS_PER_LOOK && !expected && !self.sets.values().any(Set::needs_transport) {
            return Ok(false);
        }
        self.unlooked = 0;
        self.transport.progress()
    }

    /// Acts on what came of a process set in the making.
    fn conclude(&mut self, foundation: Foundation) -> Result<()> {
        let own = self.transport.rank();
        match foundation {
            Foundation::Made { members, number } if members.contains(&own) => self.make_set(members.into(), number),
            Foundation::Refused { members, ranks, detail } if ranks.contains(own) => {
                if let Some((_, entry)) = self.founding.take_if(|(founding, _)| *founding == members) {
                    let name = entry.name.clone();
                    entry.complete(Err(Error::Mismatch { name, detail }));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Makes a set, in the order in which all ranks make them, so that they may wait for each other's memory.
    fn make_set(&mut self, members: Arc<[usize]>, number: u32) -> Result<()> {
        let Some((_, entry)) = self.founding.take_if(|(founding, _)| founding[..] == members[..]) else {
            return Ok(());
        };
        let own = self.transport.rank();
        let Some(rank) = members.iter().position(|&member| member == own).filter(|_| number < MOST_SETS) else {
            entry.refuse(&format!("a world can have no more than {MOST_SETS} process sets"));
            return Ok(());
        };
        let shared = match self.may_share && members.len() > 1 {
            true => {
                let deadline = Instant::now() + self.config.start_timeout;
                let mut part = Subset::new(&mut *self.transport, &members, rank, number);
                ShmGroup::form(&mut part, self.config.shm_slot_bytes, deadline)?
            }
            false => None,
        };
        let shares = shared.is_some();
        let sharing = shared.map_or(Sharing::None, Sharing::All);
        let mut set = Set::new(number, rank, members, sharing, &self.config, None);
        if self.closing {
            set.close(None);
        }
        self.sets.insert(number, set);
        entry.complete(Ok(Completion { shares, ..Completion::answer(number as usize) }));
        Ok(())
    }

    /// Ends everything with `error` and tells the peers.
    pub(crate) fn fail(&mut self, error: Error) {
        if self.is_over() {
            return;
        }
        self.state = State::Failed(error.clone());
        self.transport.abort(&error);
        self.sets.values_mut().for_each(|set| set.fail(&error));
        self.messages.fail(&error);
        if let Some((_, entry)) = self.founding.take() {
            entry.complete(Err(error));
        }
    }

    /// Looks, from time to time, for tensors that wait in vain, and says so. Gives how long the engine may sleep if nothing
    /// happens; `None` for as long as it likes.
    ///
    /// # Errors
    /// [`Error::Stalled`], which is to end the world.
    pub(crate) fn inspect(&mut self) -> Result<Option<Duration>> {
        if !self.sets.values().any(Set::is_waiting) {
            return Ok(None);
        }
        let now = Instant::now();
        let had_news = self.has_news();
        if let Some(age) = self.stall.look(now) {
            let overdue = self.overdue(now, age);
            match self.stall.judge(now, overdue) {
                Complaint::None => {}
                Complaint::Warning(text) => tracing::warn!("{text}"),
                Complaint::Failure(text) => return Err(Error::Stalled(text)),
            }
        }
        // News of before wait for the end of a round, which wakes.
        Ok(if self.has_news() && !had_news { Some(Duration::ZERO) } else { self.stall.pause(now) })
    }

    fn has_news(&self) -> bool {
        self.sets.values().any(Set::has_news)
    }

    /// What of this rank's has waited for `age` in any process set.
    fn overdue(&mut self, now: Instant, age: Duration) -> Vec<Overdue> {
        let of_set = |(&number, set): (&u32, &mut Set)| {
            set.overdue(now, age).into_iter().map(move |it| (number, it)).collect::<Vec<_>>()
        };
        let mut overdue: Vec<_> = self.sets.iter_mut().flat_map(of_set).collect();
        overdue.iter_mut().for_each(|(number, tensor)| self.look_elsewhere(*number, tensor));
        overdue.into_iter().map(|(_, tensor)| tensor).collect()
    }

    /// Sees whether ranks of other sets wait for this one to submit there what it has submitted in the set `number`. Where it
    /// waits for one of them, too, neither can go on, and the other set is told.
    fn look_elsewhere(&mut self, number: u32, tensor: &mut Overdue) {
        let Some(here) = self.sets.get(&number).map(Set::name) else { return };
        let waits = |(&other, set): (&u32, &Set)| {
            let ranks = set.wait_for_this_rank(&tensor.name);
            let deadlocked = ranks.iter().any(|rank| tensor.missing.contains(rank));
            (!ranks.is_empty()).then(|| (other, set.name(), deadlocked))
        };
        let others: Vec<_> = self.sets.iter().filter_map(waits).collect();
        for (other, there, deadlocked) in others {
            let (own, name) = (self.transport.rank(), &tensor.name);
            let text = format!("rank {own} submitted `{name}` in {here}, and others wait for its `{name}` in {there}");
            (tensor.astray, tensor.speaks) = (Some(text), true);
            if deadlocked && self.sets.get_mut(&number).is_some_and(|set| set.note_told(name, other)) {
                self.say_astray(Stray { name: name.clone(), set: other, place: here.clone() });
            }
        }
    }

    fn say_astray(&mut self, Stray { name, set, place }: Stray) {
        if let Some(set) = self.sets.get_mut(&set) {
            set.say_astray(&name, place);
        }
    }

    /// Whether what is under way waits for a slow link.
    pub(crate) fn is_streaming(&self) -> bool {
        self.transport.is_streaming()
    }

    /// Announces to the ranks that share memory with this one that it will sleep. `false` if it must not yet.
    pub(crate) fn prepare_sleep(&mut self) -> bool {
        if self.is_over() {
            return true;
        }
        let transport = &mut *self.transport;
        let may_sleep = self.sets.values_mut().try_fold(true, |may, set| Ok(may && set.prepare_sleep(transport)?));
        may_sleep.unwrap_or_else(|error| {
            self.fail(error);
            false
        })
    }

    /// Announces that this rank is awake. `rung`: something may have come over the transport.
    pub(crate) fn awake(&mut self, rung: bool) {
        if rung {
            self.unlooked = STEPS_PER_LOOK;
        }
        self.sets.values().for_each(Set::awake);
    }
}

impl Demand {
    /// Tells whoever waits.
    pub(crate) fn complete(self, result: Result<Completion>) {
        match self {
            Demand::Submit(_, entry)
            | Demand::Found(_, entry)
            | Demand::Remove(_, entry)
            | Demand::Exchange(_, entry) => entry.complete(result),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::submission::{Allreduce, OpKind, Output, Promise, Submission};
    use super::*;
    use crate::device::Device;
    use crate::dtype::DType;
    use crate::memory::Memory;
    use crate::transport::thread::ThreadTransport;

    fn submit(core: &mut Core, name: &str) {
        let (promise, _) = Promise::new();
        let kind = OpKind::Allreduce(Allreduce::sum());
        let submission = Submission {
            name: name.into(),
            kind,
            dtype: DType::F32,
            shape: vec![1],
            input: Memory::zeroed(4),
            output: Output::InPlace,
            device: Device::Cpu,
        };
        let items = vec![Item::new(submission, promise)];
        core.accept(Demand::Submit(WORLD, Entry { name: name.into(), items }));
        while core.step() {}
    }

    #[test]
    fn the_engine_sleeps_where_its_news_wait_for_the_end_of_a_round() {
        let transport = ThreadTransport::world(2).swap_remove(0);
        let (config, observers) = (Config::default(), Arc::default());
        let mut core = Core::new(Box::new(transport), Sharing::None, false, &config, observers).unwrap();
        submit(&mut core, "first"); // begins a round, which the other rank does not join
        submit(&mut core, "second");
        assert!(core.has_news());
        core.inspect().unwrap(); // looks for what waits in vain
        assert!(core.inspect().unwrap().is_some_and(|pause| !pause.is_zero()));
    }
}
