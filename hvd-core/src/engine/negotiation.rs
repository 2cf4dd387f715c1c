//! Which tensors are ready on all ranks, in an order that is the same on all of them.
//!
//! There is no coordinator. In each round (see [`super::exchange`]) all ranks hear the same, and each draws the same
//! conclusions: it keeps the same table of what was announced and the same cache of what was agreed on before.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cache::{Agreement, ResponseCache};
use super::exchange::Exchange;
use super::founding::{Foundation, Founding, Members};
use super::message::{Announcement, BitSet, RoundMessage, SetName, Signature, SignatureKind};
use super::stall::Overdue;
use super::tuner::Tuned;
use crate::error::{Error, Result};
use crate::shm::ShmGroup;
use crate::transport::Transport;

/// What the ranks concluded of one tensor.
#[derive(Debug)]
pub enum Verdict {
    /// All ranks have it, or have joined, and agree.
    Ready {
        /// What they agree on.
        agreement: Arc<Agreement>,
        /// How many ranks have not joined: what they contribute is all there is.
        contributors: usize,
    },
    /// All ranks have it and disagree, or have it in different sets.
    Refused {
        /// The tensor's name.
        name: String,
        /// The other sets in which ranks wait for this one to submit the tensor, as far as they do not know yet that it will
        /// not: it had it here.
        owed: Vec<u32>,
        /// Says who sent what; the same text on every rank.
        error: Error,
    },
    /// All ranks have joined.
    Joined {
        /// The one that was the last, as the world numbers it.
        last: usize,
    },
    /// What came of a process set in the making.
    Founded(Foundation),
}

/// A tensor that this rank has submitted and that is not ready yet.
struct Waiting {
    signature: Signature,
    first_dims: Vec<u64>,
    sequence: u64,
    /// Where it is in the cache, if it is: each round says it again.
    slot: Option<usize>,
    /// When the stall inspector first saw it.
    seen: Option<Instant>,
    /// The round after which it is known of every rank whether it has this tensor; `None` if no rank had it as a bit.
    counted: Option<u64>,
    /// The other sets that were told that this rank has it here.
    told: Vec<u32>,
}

/// The negotiation of one set of ranks, seen from one of them.
pub struct Negotiation {
    /// This rank in the set.
    rank: usize,
    size: usize,
    /// The set's ranks as the world numbers them.
    members: Arc<[usize]>,
    exchange: Exchange,
    cache: ResponseCache,
    /// What this rank waits for, by name.
    waiting: HashMap<String, Waiting>,
    /// Those of `waiting` that no round has told the others yet.
    unannounced: Vec<String>,
    /// What others wait for and this rank has submitted in another set, if no round has told them yet.
    astray: BTreeMap<String, SetName>,
    /// What rounds have told and is not ready. The same on all ranks.
    table: BTreeMap<String, Announcement>,
    next_sequence: u64,
    /// Rounds that have ended.
    rounds: u64,
    /// Whether this rank has something new to say.
    news: bool,
    closing: bool,
    all_closing: bool,
    /// The settings that this rank's tuner asks for.
    proposed: Option<Tuned>,
    /// Those that the ranks have agreed on in the last round.
    agreed: Option<Tuned>,
    /// Whether this rank has no more data. The others hear of it once nothing of its own waits any more.
    joining: bool,
    /// The ranks that have joined, in order. The same on all ranks.
    joined: Vec<usize>,
    /// The process set that this rank makes, if no round has told of it yet.
    asked: Option<Members>,
    founding: Founding,
}

impl Negotiation {
    /// Before the first round, for the `rank`th of `members`. `shared`: the memory that all of them share, if they do.
    pub fn new(rank: usize, members: Arc<[usize]>, cache_capacity: usize, shared: Option<&Arc<ShmGroup>>) -> Self {
        let size = members.len();
        Negotiation {
            rank,
            size,
            members,
            exchange: Exchange::new(rank, size, shared),
            cache: ResponseCache::new(cache_capacity),
            waiting: HashMap::new(),
            unannounced: Vec::new(),
            astray: BTreeMap::new(),
            table: BTreeMap::new(),
            next_sequence: 0,
            rounds: 0,
            news: false,
            closing: false,
            all_closing: false,
            proposed: None,
            agreed: None,
            joining: false,
            joined: Vec::new(),
            asked: None,
            founding: Founding::default(),
        }
    }

    /// Notes that this rank has a tensor. The name must not be waiting already. `first_dims`: of the tensors
    /// of an allgather, else empty.
    pub fn submit(&mut self, name: &str, signature: Signature, first_dims: Vec<u64>) {
        self.next_sequence += 1;
        let slot = self.cache.find(name, &signature, self.rank, &first_dims);
        if slot.is_none() {
            self.unannounced.push(name.to_string());
        }
        let (sequence, told) = (self.next_sequence, Vec::new());
        let waiting = Waiting { signature, first_dims, sequence, slot, seen: None, counted: None, told };
        self.astray.remove(name);
        self.waiting.insert(name.to_string(), waiting);
        self.news = true;
    }

    /// Says that this rank has no more data.
    pub fn join(&mut self) {
        self.joining = true;
        self.news = true;
    }

    /// Whether this rank has joined, and the others know it.
    pub fn has_joined(&self) -> bool {
        self.joined.contains(&self.rank)
    }

    /// Says that this rank makes a process set, of these ranks of the world. One at a time.
    pub fn ask_for_set(&mut self, members: Members) {
        self.asked = Some(members);
        self.news = true;
    }

    /// Says that this rank wants to shut down.
    pub fn close(&mut self) {
        self.closing = true;
        self.news = true;
    }

    /// Whether all ranks want to shut down.
    pub fn all_closing(&self) -> bool {
        self.all_closing
    }

    /// Whether messages may be under way, so that somebody must drive the transport.
    pub fn needs_transport(&self) -> bool {
        self.exchange.needs_transport()
    }

    /// Goes on as far as it can, to the end of one round at most; gives that round's conclusions in an order that is the
    /// same on all ranks. What follows from one round must not be mixed with what follows from the next: where a rank
    /// sees two rounds end at once, another sees them one by one.
    pub fn poll(&mut self, transport: &mut dyn Transport) -> Result<Option<Vec<Verdict>>> {
        if self.all_closing {
            return Ok(None);
        }
        if self.exchange.is_due(transport, self.news)? {
            let own = self.contribution();
            self.unannounced.clear();
            self.astray.clear();
            self.proposed = None;
            self.asked = None;
            self.news = false;
            self.exchange.begin(transport, own)?;
        }
        Ok(self.exchange.advance(transport)?.map(|heard| self.conclude(heard)))
    }

    /// Asks all ranks to change their settings.
    pub fn propose(&mut self, tuned: Tuned) {
        self.proposed = Some(tuned);
        self.news = true;
    }

    /// The settings to change to before what was concluded in the last round is carried out.
    pub fn take_agreed(&mut self) -> Option<Tuned> {
        self.agreed.take()
    }

    /// Whether anything of this rank's waits to be agreed on.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether this rank wants a round.
    pub fn has_news(&self) -> bool {
        self.news
    }

    /// The ranks that have this tensor and wait for this rank's. Nobody waits for a rank that has joined.
    pub fn wait_for_this_rank(&self, name: &str) -> BitSet {
        let ranks = self.table.get(name).map(Announcement::ranks).unwrap_or_default();
        match ranks.contains(self.rank) || self.has_joined() || self.waiting.contains_key(name) {
            true => BitSet::default(),
            false => ranks,
        }
    }

    /// Tells the others that this rank has submitted in `place` what they wait for here, if it has not submitted it here, too.
    pub fn say_astray(&mut self, name: &str, place: SetName) {
        if !self.waiting.contains_key(name) {
            self.astray.insert(name.to_string(), place);
            self.news = true;
        }
    }

    /// Notes that the set `other` is told that this rank has a tensor here. `false` if it was told before.
    pub fn note_told(&mut self, name: &str, other: u32) -> bool {
        let Some(waiting) = self.waiting.get_mut(name).filter(|waiting| !waiting.told.contains(&other)) else {
            return false;
        };
        waiting.told.push(other);
        true
    }

    /// What of this rank's has waited for `age`, and who lacks it. A tensor that is in the cache is announced in full first:
    /// that one is missing says nothing of which rank lacks it. It is told of once all have announced theirs.
    pub fn overdue(&mut self, now: Instant, age: Duration) -> Vec<Overdue> {
        let mut overdue = Vec::new();
        for (name, waiting) in &mut self.waiting {
            let waited = now.duration_since(*waiting.seen.get_or_insert(now));
            let Some(announcement) = self.table.get(name).filter(|_| waited >= age) else { continue };
            if waiting.counted.is_none_or(|round| self.rounds >= round) {
                let ranks = announcement.ranks();
                let lacks = |rank: &usize| !ranks.contains(*rank) && !self.joined.contains(rank);
                let missing = (0..self.size).filter(lacks).collect();
                let speaks = ranks.iter().next() == Some(self.rank);
                overdue.push(Overdue { name: name.clone(), waited, missing, speaks, astray: None });
            }
        }
        let late = |waiting: &Waiting| waiting.seen.is_some_and(|seen| now.duration_since(seen) >= age);
        let bits = self.waiting.iter().filter(|(_, waiting)| waiting.slot.is_some() && late(waiting));
        for name in bits.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.announce_in_full(&name);
        }
        overdue
    }

    fn contribution(&self) -> RoundMessage {
        let joins = self.joining && self.waiting.is_empty();
        let ready = match joins {
            // Whatever the others have, but for rows: it has none.
            true => self.cache.slots_without_rows().collect(),
            false => self.waiting.values().filter_map(|waiting| waiting.slot).collect(),
        };
        let announce = |name: &String| {
            let waiting = self.waiting.get(name)?;
            let (signature, first_dims) = (waiting.signature.clone(), waiting.first_dims.clone());
            Some((name.clone(), Announcement::new(self.rank, waiting.sequence, signature, first_dims)))
        };
        let astray =
            self.astray.iter().map(|(name, place)| (name.clone(), Announcement::astray(self.rank, place.clone())));
        let announced = self.unannounced.iter().filter_map(announce).chain(astray).collect();
        let joined = joins.then_some(self.rank).into_iter().collect();
        let founding =
            self.asked.iter().map(|members| (members.clone(), BitSet::of(self.members[self.rank]))).collect();
        RoundMessage { ready, announced, closing: self.closing, tuned: self.proposed, joined, founding }
    }

    /// Draws the conclusions of a round. Everything that changes the cache or the table depends on `heard` alone.
    fn conclude(&mut self, heard: RoundMessage) -> Vec<Verdict> {
        self.rounds += 1;
        self.all_closing = heard.closing;
        self.agreed = heard.tuned;
        let ready: Vec<_> = heard.ready.iter().filter_map(|slot| self.hit(slot)).collect();
        let newly_joined = self.note_joined(&heard.joined);
        let mut verdicts: Vec<_> = ready.into_iter().map(|agreement| self.carry_out(agreement)).collect();
        let mut names: Vec<_> =
            heard.announced.into_iter().map(|(name, said)| self.note_announced(name, said)).collect();
        if newly_joined {
            names = self.table.keys().cloned().collect();
        }
        for name in self.complete(names) {
            if let Some(announcement) = self.table.remove(&name) {
                let owed = self.waiting.remove(&name).map(|waiting| owed(waiting, &announcement)).unwrap_or_default();
                verdicts.push(self.judge(name, announcement, owed));
            }
        }
        verdicts.extend(self.founding.conclude(heard.founding).into_iter().map(Verdict::Founded));
        verdicts.extend(self.all_joined());
        // The others have not heard that it has joined while something of its own was waiting.
        self.news |= self.joining && self.waiting.is_empty() && !self.has_joined();
        verdicts
    }

    /// What is in a slot that is waiting on all ranks.
    fn hit(&mut self, slot: usize) -> Option<Arc<Agreement>> {
        let agreement = self.cache.get(slot)?.clone();
        self.cache.touch(slot);
        self.waiting.remove(&agreement.name);
        Some(agreement)
    }

    /// Takes in who has joined. Gives whether anybody is new.
    fn note_joined(&mut self, joined: &BitSet) -> bool {
        let new: Vec<_> = joined.iter().filter(|rank| !self.joined.contains(rank)).collect();
        if new.is_empty() {
            return false;
        }
        self.joined.extend(new);
        // Whoever has joined has no rows, so what was agreed on of rows is no more.
        for name in self.cache.names_with_rows() {
            self.forget(&name);
        }
        true
    }

    /// Takes in what was announced of a name; gives the name.
    fn note_announced(&mut self, name: String, announcement: Announcement) -> String {
        if announcement.variants.is_empty() && !self.table.contains_key(&name) {
            return name; // Who is astray was waited for, and is no more.
        }
        let was_cached = self.forget(&name);
        let known = self.table.entry(name.clone()).or_default();
        match known.variants.is_empty() {
            true => *known = announcement,
            false => known.merge(announcement),
        }
        if was_cached && !self.is_complete(&name) {
            // Who had it as a bit announces it in the next round: so there must be one, and it tells who has it.
            self.news = true;
            if let Some(waiting) = self.waiting.get_mut(&name) {
                waiting.counted = Some(self.rounds + 1);
            }
        }
        name
    }

    fn is_complete(&self, name: &str) -> bool {
        let Some(announcement) = self.table.get(name) else { return false };
        let mut ranks = announcement.answered();
        ranks.union(&self.joined.iter().copied().collect());
        ranks.count() == self.size
    }

    /// Those of `names` that all ranks have, in an order that is the same on all of them.
    fn complete(&self, mut names: Vec<String>) -> Vec<String> {
        names.retain(|name| self.is_complete(name));
        names.sort_by_key(|name| (self.table.get(name).map(|announcement| announcement.order), name.clone()));
        names
    }

    fn judge(&mut self, name: String, announcement: Announcement, owed: Vec<u32>) -> Verdict {
        let (signature, first_dims) = match announcement.agreement(&name, &self.members) {
            Ok(agreed) => agreed,
            Err(error) => return Verdict::Refused { name, owed, error },
        };
        let agreement = Arc::new(Agreement { name, signature, first_dims });
        let lasts = agreement.first_dims.is_empty() || self.joined.is_empty();
        if lasts
            && agreement.signature.kind != SignatureKind::Barrier
            && let Some(evicted) = self.cache.insert(agreement.clone())
        {
            self.announce_in_full(&evicted.name);
        }
        self.carry_out(agreement)
    }

    /// What follows from an agreement: a rank that has joined has nothing to broadcast.
    fn carry_out(&self, agreement: Arc<Agreement>) -> Verdict {
        let joined = |root: &usize| self.joined.iter().any(|&rank| self.members[rank] == *root);
        match agreement.signature.kind {
            SignatureKind::Broadcast { root } if joined(&(root as usize)) => {
                let name = agreement.name.clone();
                let error =
                    Error::Invalid(format!("`{name}`: the root, rank {root}, has joined and has nothing to broadcast"));
                Verdict::Refused { name, owed: Vec::new(), error }
            }
            _ => Verdict::Ready { agreement, contributors: self.size - self.joined.len() },
        }
    }

    fn all_joined(&mut self) -> Option<Verdict> {
        let last = *self.joined.last().filter(|_| self.joined.len() == self.size)?;
        self.joined.clear();
        self.joining = false;
        Some(Verdict::Joined { last: self.members[last] })
    }

    /// Takes a name out of the cache. Gives whether it was there.
    fn forget(&mut self, name: &str) -> bool {
        self.announce_in_full(name);
        self.cache.remove(name)
    }

    /// What was said with a bit, if this rank waits for it, is said in full from now on.
    fn announce_in_full(&mut self, name: &str) {
        if self.waiting.get_mut(name).and_then(|waiting| waiting.slot.take()).is_some() {
            self.unannounced.push(name.to_string());
            self.news = true;
        }
    }
}

/// The sets of those who are astray that were not told that this rank waited for them here.
fn owed(waiting: Waiting, announcement: &Announcement) -> Vec<u32> {
    let sets: BTreeSet<_> = announcement.astray.values().map(|place| place.number).collect();
    sets.into_iter().filter(|set| !waiting.told.contains(set)).collect()
}
