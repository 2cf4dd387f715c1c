//! What ranks tell each other before they reduce: which tensors they have, and what they mean to do with them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::submission::{OpKind, Submission};
use super::tuner::Tuned;
use crate::dtype::DType;
use crate::reduce::ReduceOp;
use crate::wire::Compression;

/// A set of small numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitSet(Vec<u64>);

impl BitSet {
    /// The set of `index` alone.
    pub fn of(index: usize) -> Self {
        let mut set = BitSet::default();
        set.insert(index);
        set
    }

    /// Adds a number.
    pub fn insert(&mut self, index: usize) {
        let word = index / 64;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (index % 64);
    }

    /// Whether a number is in the set.
    pub fn contains(&self, index: usize) -> bool {
        self.0.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let bits =
            |(at, &word): (usize, &u64)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |b| at * 64 + b);
        self.0.iter().enumerate().flat_map(bits)
    }

    fn union(&mut self, other: &BitSet) {
        if other.0.len() > self.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word |= other);
    }

    fn intersect(&mut self, other: &BitSet) {
        self.0.truncate(other.0.len());
        self.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word &= other);
    }

    fn highest(&self) -> Option<usize> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        Some(word * 64 + 63 - self.0[word].leading_zeros() as usize)
    }
}

/// The part of a submission on which all ranks must agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// What to do.
    pub kind: SignatureKind,
    /// Element type.
    pub dtype: DType,
    /// Dimensions; for an allgather without the first.
    pub shape: Vec<u64>,
}

/// [`OpKind`] with comparable numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Fields as in `OpKind`; scale factors by their bits.
pub enum SignatureKind {
    Allreduce { op: ReduceOp, prescale_bits: u64, postscale_bits: u64, compression: Compression },
    Broadcast { root: u64 },
    Allgather,
    Barrier,
}

impl Signature {
    /// What the other ranks must submit, too.
    pub fn of(submission: &Submission) -> Self {
        let kind = match submission.kind {
            OpKind::Allreduce(options) => SignatureKind::Allreduce {
                op: options.op,
                prescale_bits: options.prescale.to_bits(),
                postscale_bits: options.postscale.to_bits(),
                compression: options.compression,
            },
            OpKind::Broadcast { root } => SignatureKind::Broadcast { root: root as u64 },
            OpKind::Allgather => SignatureKind::Allgather,
            OpKind::Barrier => SignatureKind::Barrier,
        };
        let agreed = usize::from(kind == SignatureKind::Allgather);
        let shape = submission.shape.iter().skip(agreed).map(|&dim| dim as u64).collect();
        Signature { kind, dtype: submission.dtype, shape }
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            SignatureKind::Allreduce { op, prescale_bits, postscale_bits, compression } => {
                write!(f, "allreduce({op:?}")?;
                let (prescale, postscale) = (f64::from_bits(prescale_bits), f64::from_bits(postscale_bits));
                if prescale != 1.0 || postscale != 1.0 {
                    write!(f, ", prescale {prescale}, postscale {postscale}")?;
                }
                if compression != Compression::None {
                    write!(f, ", compression {compression:?}")?;
                }
                write!(f, ") of {} {:?}", self.dtype, self.shape)
            }
            SignatureKind::Broadcast { root } => write!(f, "broadcast(root {root}) of {} {:?}", self.dtype, self.shape),
            SignatureKind::Allgather => write!(f, "allgather of {} rows of {:?}", self.dtype, self.shape),
            SignatureKind::Barrier => f.write_str("barrier"),
        }
    }
}

/// What some ranks have said of one name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// The announcing rank's running number, of the lowest rank that announced; orders what is ready at once.
    pub order: (u64, u64),
    /// Each different signature with the ranks that sent it.
    pub variants: Vec<(Signature, BitSet)>,
    /// Of an allgather: each announcing rank's first dimension.
    pub first_dims: BTreeMap<u64, u64>,
}

impl Announcement {
    /// One rank's announcement.
    pub fn new(rank: usize, sequence: u64, signature: Signature, first_dim: Option<u64>) -> Self {
        let first_dims = first_dim.map(|dim| (rank as u64, dim)).into_iter().collect();
        Announcement { order: (rank as u64, sequence), variants: vec![(signature, BitSet::of(rank))], first_dims }
    }

    /// The ranks that have announced the name.
    pub fn ranks(&self) -> BitSet {
        let mut all = BitSet::default();
        self.variants.iter().for_each(|(_, ranks)| all.union(ranks));
        all
    }

    /// Adds what other ranks said. Hearing the same twice changes nothing.
    pub fn merge(&mut self, other: Announcement) {
        self.order = self.order.min(other.order);
        for (signature, ranks) in other.variants {
            match self.variants.iter_mut().find(|(known, _)| *known == signature) {
                Some((_, known_ranks)) => known_ranks.union(&ranks),
                None => self.variants.push((signature, ranks)),
            }
        }
        self.first_dims.extend(other.first_dims);
    }

    /// Who sent what, for an error. The same text on every rank.
    pub fn describe(&self) -> String {
        let mut lines: Vec<_> = self.variants.iter().collect();
        lines.sort_by_key(|(_, ranks)| ranks.iter().next());
        let line = |(signature, ranks): &(Signature, BitSet)| {
            let ranks: Vec<_> = ranks.iter().map(|rank| rank.to_string()).collect();
            let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
            format!("{noun} {} sent {signature}", ranks.join(", "))
        };
        lines.into_iter().map(line).collect::<Vec<_>>().join("; ")
    }
}

/// What the ranks say in one round of negotiation. Merging is idempotent, commutative and associative, so that it does
/// not matter on which ways, and how often, a rank hears of another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundMessage {
    /// Cache slots whose tensors are waiting on every rank heard so far.
    pub ready: BitSet,
    /// Tensors that are not in the cache, by name.
    pub announced: BTreeMap<String, Announcement>,
    /// Whether every rank heard so far wants to shut down.
    pub closing: bool,
    /// The settings to change to, from rank 0's tuner.
    pub tuned: Option<Tuned>,
}

impl RoundMessage {
    /// Adds what other ranks said.
    pub fn merge(&mut self, other: RoundMessage) {
        self.ready.intersect(&other.ready);
        self.closing &= other.closing;
        self.tuned = self.tuned.or(other.tuned);
        for (name, announcement) in other.announced {
            match self.announced.entry(name) {
                std::collections::btree_map::Entry::Occupied(mut known) => known.get_mut().merge(announcement),
                std::collections::btree_map::Entry::Vacant(vacant) => drop(vacant.insert(announcement)),
            }
        }
    }

    /// Reads a peer's message. The text says what is wrong with it.
    pub fn decode(bytes: &[u8], size: usize) -> std::result::Result<Self, String> {
        let message: RoundMessage = postcard::from_bytes(bytes).map_err(|error| error.to_string())?;
        if message.tuned.is_some_and(|tuned| tuned.segment_bytes == 0) {
            return Err("the tuner asks for segments of no bytes".into());
        }
        for (name, announcement) in &message.announced {
            let highest = announcement.variants.iter().filter_map(|(_, ranks)| ranks.highest()).max();
            let gathered = announcement.first_dims.keys().next_back().map(|&rank| rank as usize);
            if announcement.variants.is_empty() || highest.max(gathered).is_none_or(|rank| rank >= size) {
                return Err(format!("the announcement of `{name}` names no rank of this world"));
            }
        }
        Ok(message)
    }

    /// The bytes for a peer. Never empty.
    pub fn encode(&self) -> std::result::Result<Vec<u8>, String> {
        postcard::to_stdvec(self).map_err(|error| error.to_string())
    }
}
