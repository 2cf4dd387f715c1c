//! Which tensors are ready on all ranks, in an order that is the same on all of them.
//!
//! There is no coordinator. In each round (see [`super::exchange`]) all ranks hear the same, and each draws the same
//! conclusions: it keeps the same table of what was announced and the same cache of what was agreed on before.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cache::{Agreement, ResponseCache};
use super::exchange::Exchange;
use super::message::{Announcement, BitSet, RoundMessage, Signature, SignatureKind};
use super::stall::Overdue;
use super::tuner::Tuned;
use crate::error::{Error, Result};
use crate::shm::ShmGroup;
use crate::transport::Transport;

/// What the ranks concluded of one tensor.
#[derive(Debug)]
pub enum Verdict {
    /// All ranks have it and agree.
    Ready(Agreement),
    /// All ranks have it and disagree.
    Refused {
        /// The tensor's name.
        name: String,
        /// Says who sent what; the same text on every rank.
        error: Error,
    },
}

/// A tensor that this rank has submitted and that is not ready yet.
struct Waiting {
    signature: Signature,
    first_dims: Vec<u64>,
    sequence: u64,
    /// When the stall inspector first saw it.
    seen: Option<Instant>,
    /// The round after which it is known of every rank whether it has this tensor: not while it is but a bit.
    counted: Option<u64>,
}

/// The negotiation of one world, seen from one rank.
pub struct Negotiation {
    rank: usize,
    size: usize,
    exchange: Exchange,
    cache: ResponseCache,
    /// What this rank waits for, by name.
    waiting: HashMap<String, Waiting>,
    /// Those of `waiting` that are in the cache, by slot: each round says them again.
    cached: BTreeMap<usize, String>,
    /// Those of `waiting` that no round has told the others yet.
    unannounced: Vec<String>,
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
}

impl Negotiation {
    /// Before the first round. `shared`: the memory that all ranks share, if they do.
    pub fn new(rank: usize, size: usize, cache_capacity: usize, shared: Option<&Arc<ShmGroup>>) -> Self {
        Negotiation {
            rank,
            size,
            exchange: Exchange::new(rank, size, shared),
            cache: ResponseCache::new(cache_capacity),
            waiting: HashMap::new(),
            cached: BTreeMap::new(),
            unannounced: Vec::new(),
            table: BTreeMap::new(),
            next_sequence: 0,
            rounds: 0,
            news: false,
            closing: false,
            all_closing: false,
            proposed: None,
            agreed: None,
        }
    }

    /// Notes that this rank has a tensor. The name must not be waiting already. `first_dims`: of the tensors
    /// of an allgather, else empty.
    pub fn submit(&mut self, name: &str, signature: Signature, first_dims: Vec<u64>) {
        self.next_sequence += 1;
        match self.cache.find(name, &signature, self.rank, &first_dims) {
            Some(slot) => drop(self.cached.insert(slot, name.to_string())),
            None => self.unannounced.push(name.to_string()),
        }
        let waiting = Waiting { signature, first_dims, sequence: self.next_sequence, seen: None, counted: None };
        self.waiting.insert(name.to_string(), waiting);
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
            self.proposed = None;
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

    /// What of this rank's has waited for `age`, and who lacks it. A tensor that is in the cache is announced in full first:
    /// that one is missing says nothing of which rank lacks it. It is told of once all have announced theirs.
    pub fn overdue(&mut self, now: Instant, age: Duration) -> Vec<Overdue> {
        let mut overdue = Vec::new();
        for (name, waiting) in &mut self.waiting {
            let waited = now.duration_since(*waiting.seen.get_or_insert(now));
            let Some(announcement) = self.table.get(name).filter(|_| waited >= age) else { continue };
            if waiting.counted.is_none_or(|round| self.rounds >= round) {
                let ranks = announcement.ranks();
                let missing = (0..self.size).filter(|&rank| !ranks.contains(rank)).collect();
                let speaks = ranks.iter().next() == Some(self.rank);
                overdue.push(Overdue { name: name.clone(), waited, missing, speaks });
            }
        }
        self.cached.retain(|_, name| {
            let Some(waiting) = self.waiting.get_mut(name) else { return true };
            let waits = waiting.seen.is_none_or(|seen| now.duration_since(seen) < age);
            if !waits {
                // The round of the announcement, the others' answer, and the one that may be under way.
                waiting.counted = Some(self.rounds + 2 + u64::from(self.exchange.is_active()));
                self.unannounced.push(std::mem::take(name));
                self.news = true;
            }
            waits
        });
        overdue
    }

    fn contribution(&self) -> RoundMessage {
        let mut ready = BitSet::default();
        self.cached.keys().for_each(|&slot| ready.insert(slot));
        let announce = |name: &String| {
            let waiting = self.waiting.get(name)?;
            let (signature, first_dims) = (waiting.signature.clone(), waiting.first_dims.clone());
            Some((name.clone(), Announcement::new(self.rank, waiting.sequence, signature, first_dims)))
        };
        let announced = self.unannounced.iter().filter_map(announce).collect();
        RoundMessage { ready, announced, closing: self.closing, tuned: self.proposed }
    }

    /// Draws the conclusions of a round. Everything that changes the cache or the table depends on `heard` alone.
    fn conclude(&mut self, heard: RoundMessage) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        self.rounds += 1;
        self.all_closing = heard.closing;
        self.agreed = heard.tuned;
        for slot in heard.ready.iter() {
            if let Some(agreement) = self.cache.get(slot).cloned() {
                self.cache.touch(slot);
                self.cached.remove(&slot);
                self.waiting.remove(&agreement.name);
                verdicts.push(Verdict::Ready(agreement));
            }
        }
        let mut complete = Vec::new();
        for (name, announcement) in heard.announced {
            let evicted = self.cache.remove(&name);
            self.announce_again(evicted);
            let known = self.table.entry(name.clone()).or_default();
            match known.variants.is_empty() {
                true => *known = announcement,
                false => known.merge(announcement),
            }
            if known.ranks().count() == self.size {
                complete.push((known.order, name));
            } else {
                // Who had it as a bit announces it in the next round: so there must be one.
                self.news |= evicted.is_some();
            }
        }
        complete.sort();
        for (_, name) in complete {
            if let Some(announcement) = self.table.remove(&name) {
                self.waiting.remove(&name);
                verdicts.push(self.judge(name, announcement));
            }
        }
        verdicts
    }

    fn judge(&mut self, name: String, announcement: Announcement) -> Verdict {
        let (signature, first_dims) = match announcement.agreement(&name) {
            Ok(agreed) => agreed,
            Err(error) => return Verdict::Refused { name, error },
        };
        let agreement = Agreement { name, signature, first_dims };
        if agreement.signature.kind != SignatureKind::Barrier {
            let evicted = self.cache.insert(agreement.clone());
            self.announce_again(evicted);
        }
        Verdict::Ready(agreement)
    }

    /// What waited under a slot that is no more must be announced in full.
    fn announce_again(&mut self, evicted: Option<usize>) {
        if let Some(name) = evicted.and_then(|slot| self.cached.remove(&slot)) {
            self.unannounced.push(name);
            self.news = true;
        }
    }
}
