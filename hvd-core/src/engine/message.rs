//! What ranks tell each other before they reduce: which tensors they have, and what they mean to do with them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::WORLD;
use super::submission::{Allreduce, OpKind, Submission};
use super::tuner::Tuned;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Error;
use crate::reduce::ReduceOp;
use crate::shm::Place;
use crate::wire::Compression;

/// Bytes of a message, mostly.
const USUAL_BYTES: usize = 64;

/// A set of small numbers. What a repeated step says of up to 256 tensors takes no allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitSet(SmallVec<[u64; 4]>);

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

    /// Adds the numbers of another set.
    pub fn union(&mut self, other: &BitSet) {
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

impl FromIterator<usize> for BitSet {
    fn from_iter<I: IntoIterator<Item = usize>>(numbers: I) -> Self {
        let mut set = BitSet::default();
        numbers.into_iter().for_each(|number| set.insert(number));
        set
    }
}

/// The part of a submission, or of a group of them, on which all ranks must agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// What to do.
    pub kind: SignatureKind,
    /// Where the tensors lie.
    pub device: Device,
    /// The tensors: one, or those of a group.
    pub tensors: SmallVec<[TensorSignature; 1]>,
}

/// The part of one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSignature {
    /// Element type.
    pub dtype: DType,
    /// Dimensions; without the first where that may differ from rank to rank.
    pub shape: SmallVec<[u64; 4]>,
    /// Where in a shared buffer the elements lie, if they are to be reduced in place.
    pub place: Option<Place>,
}

/// [`OpKind`] with comparable numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Fields as in `OpKind`.
pub enum SignatureKind {
    Allreduce(Combining),
    Broadcast {
        root: u64,
    },
    Allgather,
    Alltoall,
    /// An alltoall whose splits are not all of its rows: agreed on by all ranks or not, it is refused.
    UnfitAlltoall {
        rows: u64,
        splits: Option<Vec<u64>>,
    },
    Reducescatter(Combining),
    Barrier,
}

/// [`Allreduce`] with comparable numbers: the scale factors by their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Fields as in `Allreduce`.
pub struct Combining {
    pub op: ReduceOp,
    pub prescale_bits: u64,
    pub postscale_bits: u64,
    pub compression: Compression,
}

impl From<Allreduce> for Combining {
    fn from(options: Allreduce) -> Self {
        let Allreduce { op, prescale, postscale, compression } = options;
        Combining { op, prescale_bits: prescale.to_bits(), postscale_bits: postscale.to_bits(), compression }
    }
}

impl From<Combining> for Allreduce {
    fn from(combining: Combining) -> Self {
        let Combining { op, prescale_bits, postscale_bits, compression } = combining;
        let (prescale, postscale) = (f64::from_bits(prescale_bits), f64::from_bits(postscale_bits));
        Allreduce { op, prescale, postscale, compression }
    }
}

impl SignatureKind {
    fn of(submission: &Submission, ranks: usize) -> Self {
        match &submission.kind {
            OpKind::Allreduce(options) => SignatureKind::Allreduce((*options).into()),
            OpKind::Broadcast { root } => SignatureKind::Broadcast { root: *root as u64 },
            OpKind::Allgather => SignatureKind::Allgather,
            OpKind::Alltoall { splits } => Self::of_alltoall(submission.shape[0], splits.as_deref(), ranks),
            OpKind::Reducescatter(options) => SignatureKind::Reducescatter((*options).into()),
            // A join is no operation on a tensor; the negotiation knows it by other means.
            OpKind::Barrier | OpKind::Join => SignatureKind::Barrier,
        }
    }

    fn of_alltoall(rows: usize, splits: Option<&[usize]>, ranks: usize) -> Self {
        let fits = match splits {
            Some(splits) => splits.iter().try_fold(0usize, |sum, &split| sum.checked_add(split)) == Some(rows),
            None => rows.is_multiple_of(ranks),
        };
        let number = |&split: &usize| split as u64;
        match fits {
            true => SignatureKind::Alltoall,
            false => SignatureKind::UnfitAlltoall {
                rows: rows as u64,
                splits: splits.map(|splits| splits.iter().map(number).collect()),
            },
        }
    }

    /// The operation without its scale factors, for elements that must stay as they are.
    pub fn unscaled(&self) -> OpKind {
        let plain = |options: &Combining| Allreduce { prescale: 1.0, ..(*options).into() };
        match self {
            SignatureKind::Allreduce(options) => OpKind::Allreduce(plain(options)),
            SignatureKind::Broadcast { root } => OpKind::Broadcast { root: *root as usize },
            SignatureKind::Allgather => OpKind::Allgather,
            SignatureKind::Alltoall | SignatureKind::UnfitAlltoall { .. } => OpKind::Alltoall { splits: None },
            SignatureKind::Reducescatter(options) => OpKind::Reducescatter(plain(options)),
            SignatureKind::Barrier => OpKind::Barrier,
        }
    }

    /// Whether the ranks may have different numbers of rows.
    pub fn has_free_rows(&self) -> bool {
        matches!(self, SignatureKind::Allgather | SignatureKind::Alltoall | SignatureKind::UnfitAlltoall { .. })
    }
}

impl Signature {
    /// What the other ranks must submit, too. `submissions`: those of a group are all of one kind; at least one. `place` tells
    /// where one lies that can be reduced in place.
    pub fn of<'a>(
        submissions: impl IntoIterator<Item = &'a Submission>,
        ranks: usize,
        place: impl Fn(&Submission) -> Option<Place>,
    ) -> Option<Self> {
        let mut submissions = submissions.into_iter().peekable();
        let first = submissions.peek()?;
        let (kind, device) = (SignatureKind::of(first, ranks), first.device);
        let free = usize::from(kind.has_free_rows());
        let tensor = |submission: &Submission| TensorSignature {
            dtype: submission.dtype,
            shape: submission.shape.iter().skip(free).map(|&dim| dim as u64).collect(),
            place: place(submission),
        };
        Some(Signature { kind, device, tensors: submissions.map(tensor).collect() })
    }

    /// Why no rank could carry this out.
    fn flaw(&self) -> Option<&'static str> {
        match (&self.kind, self.device) {
            (SignatureKind::UnfitAlltoall { .. }, _) => Some("the splits must add up to the rows"),
            (_, Device::Cuda) => Some("no backend serves memory on cuda yet; copy it to the cpu"),
            (_, Device::Cpu) => None,
        }
    }

    fn describe_tensors(&self) -> String {
        let rows = if self.kind.has_free_rows() { " rows of" } else { "" };
        let tensor = |tensor: &TensorSignature| format!("{}{rows} {:?}", tensor.dtype, tensor.shape);
        let tensors: Vec<_> = self.tensors.iter().map(tensor).collect();
        match tensors.len() {
            1 => tensors.concat(),
            count => format!("{count} tensors: {}", tensors.join(", ")),
        }
    }
}

impl fmt::Display for Combining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Allreduce { op, prescale, postscale, compression } = (*self).into();
        write!(f, "({op:?}")?;
        if prescale != 1.0 || postscale != 1.0 {
            write!(f, ", prescale {prescale}, postscale {postscale}")?;
        }
        if compression != Compression::None {
            write!(f, ", compression {compression:?}")?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for SignatureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SignatureKind::Allreduce(combining) => write!(f, "allreduce{combining}"),
            SignatureKind::Broadcast { root } => write!(f, "broadcast(root {root})"),
            SignatureKind::Allgather => f.write_str("allgather"),
            SignatureKind::Alltoall => f.write_str("alltoall"),
            SignatureKind::UnfitAlltoall { rows, splits: Some(splits) } => {
                write!(f, "alltoall(splits {splits:?}, which are not its {rows} rows)")
            }
            SignatureKind::UnfitAlltoall { rows, splits: None } => {
                write!(f, "alltoall(no splits, and {rows} rows, which cannot be split equally)")
            }
            SignatureKind::Reducescatter(combining) => write!(f, "reducescatter{combining}"),
            SignatureKind::Barrier => f.write_str("barrier"),
        }
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if self.kind != SignatureKind::Barrier {
            write!(f, " of {}", self.describe_tensors())?;
        }
        match self.device {
            Device::Cpu => Ok(()),
            device => write!(f, " on {device}"),
        }
    }
}

/// What a set of ranks is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SetName {
    /// [`WORLD`] or another, by which its members find it.
    pub number: u32,
    /// For those who are no members: the ranks of the world in it.
    pub members: Vec<usize>,
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            WORLD => f.write_str("the world"),
            _ => write!(f, "the process set {:?}", self.members),
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
    /// Of an allgather: each announcing rank's first dimension of each tensor.
    pub first_dims: BTreeMap<u64, Vec<u64>>,
    /// The ranks that do not announce it, as each has submitted it in another set and waits there for some of those that have
    /// announced it here. Who announces it later is astray no more.
    pub astray: BTreeMap<u64, SetName>,
}

impl Announcement {
    /// One rank's announcement. `first_dims`: of an allgather, else empty.
    pub fn new(rank: usize, sequence: u64, signature: Signature, first_dims: Vec<u64>) -> Self {
        let first_dims = Some(first_dims).filter(|dims| !dims.is_empty());
        let first_dims = first_dims.map(|dims| (rank as u64, dims)).into_iter().collect();
        let variants = vec![(signature, BitSet::of(rank))];
        Announcement { order: (rank as u64, sequence), variants, first_dims, astray: BTreeMap::new() }
    }

    /// One rank's word that it has submitted the name in another set.
    pub fn astray(rank: usize, place: SetName) -> Self {
        Announcement { order: (u64::MAX, u64::MAX), astray: [(rank as u64, place)].into(), ..Announcement::default() }
    }

    /// The ranks that have announced the name.
    pub fn ranks(&self) -> BitSet {
        let mut all = BitSet::default();
        self.variants.iter().for_each(|(_, ranks)| all.union(ranks));
        all
    }

    /// The ranks that have announced it, or have said that they are astray.
    pub fn answered(&self) -> BitSet {
        let mut all: BitSet = self.astray.keys().map(|&rank| rank as usize).collect();
        all.union(&self.ranks());
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
        self.astray.extend(other.astray);
        let announced = self.ranks();
        self.astray.retain(|&rank, _| !announced.contains(rank as usize));
    }

    /// Who sent what, for an error: the same text on every rank. `members`: the set's ranks as the world numbers them.
    pub fn describe(&self, members: &[usize]) -> String {
        let mut strays: BTreeMap<&SetName, BitSet> = BTreeMap::new();
        self.astray.iter().for_each(|(&rank, place)| strays.entry(place).or_default().insert(rank as usize));
        let sent = self.variants.iter().map(|(signature, ranks)| (ranks.clone(), signature.to_string()));
        let astray = strays.into_iter().map(|(place, ranks)| (ranks, format!("it in {place}")));
        let mut lines: Vec<_> = sent.chain(astray).collect();
        lines.sort_by_key(|(ranks, _)| ranks.iter().next());
        let line = |(ranks, what): (BitSet, String)| {
            let ranks: Vec<_> = ranks.iter().map(|rank| members.get(rank).unwrap_or(&rank).to_string()).collect();
            let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
            format!("{noun} {} sent {what}", ranks.join(", "))
        };
        lines.into_iter().map(line).collect::<Vec<_>>().join("; ")
    }

    /// Takes signatures that differ in nothing but places for one without: such ranks reduce as if their elements lay
    /// anywhere.
    fn unite_places(&mut self) {
        if self.variants.len() < 2 {
            return;
        }
        for (mut signature, ranks) in std::mem::take(&mut self.variants) {
            signature.tensors.iter_mut().for_each(|tensor| tensor.place = None);
            self.merge(Announcement {
                order: self.order,
                variants: vec![(signature, ranks)],
                ..Announcement::default()
            });
        }
    }

    /// What all ranks agree on: the signature and the first dimensions of an allgather.
    ///
    /// # Errors
    /// [`Error::Mismatch`] where the ranks disagree, [`Error::Invalid`] where they agree on what cannot be. The text says who
    /// sent what and is the same on every rank.
    pub fn agreement(mut self, name: &str, members: &[usize]) -> Result<(Signature, Vec<Vec<u64>>), Error> {
        self.unite_places();
        let flaw = match &self.variants[..] {
            [(signature, _)] if self.astray.is_empty() => signature.flaw(),
            _ => return Err(Error::Mismatch { name: name.into(), detail: self.describe(members) }),
        };
        match (flaw, self.variants.pop()) {
            (None, Some((signature, _))) => {
                let dims = first_dims(&signature, self.first_dims, members.len());
                Ok((signature, dims))
            }
            (flaw, last) => {
                self.variants.extend(last);
                let flaw = flaw.unwrap_or("nothing was announced");
                Err(Error::Invalid(format!("`{name}`: {}: {flaw}", self.describe(members))))
            }
        }
    }

    /// What is wrong with an announcement in a world of `size` ranks.
    fn flaw(&self, size: usize) -> Option<&'static str> {
        let highest = self.variants.iter().filter_map(|(_, ranks)| ranks.highest()).max();
        let gathered = self.first_dims.keys().chain(self.astray.keys()).max().map(|&rank| rank as usize);
        let counted =
            |dims: &Vec<u64>| self.variants.iter().any(|(signature, _)| signature.tensors.len() == dims.len());
        if highest.max(gathered).is_none_or(|rank| rank >= size) {
            Some("names no rank of this world")
        } else if !self.first_dims.values().all(counted) {
            Some("gives dimensions of other tensors")
        } else {
            None
        }
    }
}

/// Each rank's first dimension of each tensor, of an allgather. A rank that has joined has no rows.
fn first_dims(signature: &Signature, mut announced: BTreeMap<u64, Vec<u64>>, ranks: usize) -> Vec<Vec<u64>> {
    let none = || vec![0; signature.tensors.len()];
    match signature.kind {
        SignatureKind::Allgather => {
            (0..ranks as u64).map(|rank| announced.remove(&rank).unwrap_or_else(none)).collect()
        }
        _ => Vec::new(),
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
    /// The ranks that have no more data.
    pub joined: BitSet,
    /// Process sets that ranks make, with those ranks.
    pub founding: BTreeMap<Vec<usize>, BitSet>,
}

impl RoundMessage {
    /// Adds what other ranks said.
    pub fn merge(&mut self, other: RoundMessage) {
        self.ready.intersect(&other.ready);
        self.closing &= other.closing;
        self.tuned = self.tuned.or(other.tuned);
        self.joined.union(&other.joined);
        for (members, ranks) in other.founding {
            self.founding.entry(members).or_default().union(&ranks);
        }
        for (name, announcement) in other.announced {
            match self.announced.entry(name) {
                std::collections::btree_map::Entry::Occupied(mut known) => known.get_mut().merge(announcement),
                std::collections::btree_map::Entry::Vacant(vacant) => drop(vacant.insert(announcement)),
            }
        }
    }

    /// Reads a peer's message. The text says what is wrong with it.
    pub fn decode(bytes: &[u8], size: usize) -> Result<Self, String> {
        let message: RoundMessage = postcard::from_bytes(bytes).map_err(|error| error.to_string())?;
        if message.tuned.is_some_and(|tuned| tuned.segment_bytes == 0) {
            return Err("the tuner asks for segments of no bytes".into());
        }
        let founders = message.founding.values().filter_map(BitSet::highest);
        let founded = message.founding.keys().flatten().copied();
        if founders.chain(founded).chain(message.joined.highest()).any(|rank| rank >= size) {
            return Err("it names a rank that is none".into());
        }
        let flawed = |(name, announcement): (&String, &Announcement)| Some((name.clone(), announcement.flaw(size)?));
        if let Some((name, flaw)) = message.announced.iter().find_map(flawed) {
            return Err(format!("the announcement of `{name}` {flaw}"));
        }
        Ok(message)
    }

    /// The bytes for a peer. Never empty.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        postcard::to_extend(self, Vec::with_capacity(USUAL_BYTES)).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_announces_late_is_astray_no_more() {
        let signature = Signature { kind: SignatureKind::Barrier, device: Device::Cpu, tensors: SmallVec::new() };
        let announced = |rank| Announcement::new(rank, 5, signature.clone(), Vec::new());
        let mut known = announced(0);
        known.merge(Announcement::astray(1, SetName { number: 7, members: vec![2, 4] }));
        assert_eq!((known.ranks().count(), known.answered().count(), known.order), (1, 2, (0, 5)));
        let Err(Error::Mismatch { detail, .. }) = known.clone().agreement("x", &[2, 4]) else { panic!("{known:?}") };
        assert_eq!(detail, "rank 2 sent barrier; rank 4 sent it in the process set [2, 4]");
        let mut other_way = Announcement::astray(1, SetName { number: 7, members: vec![2, 4] });
        other_way.merge(announced(1));
        for late in [announced(1), other_way] {
            let mut all = known.clone();
            all.merge(late);
            assert!(all.agreement("x", &[2, 4]).is_ok());
        }
    }
}
