//! Ranks that carry out operations together.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Backend, Inner, solo};
use crate::dtype::{DType, Element};
use crate::engine::submission::{OpKind, Output, Submission};
use crate::engine::{Engine, GroupHandle, Handle, WORLD};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// Some ranks of a world, or all of them, and what they do together, seen from one of them. Clones are the same set.
///
/// Ranks keep their numbers: a root or a peer is given as a rank of the *world*. What has an entry for each rank (the result
/// of an allgather, splits) is in the set's order, ascending. Every rank of the set must submit the same operations under
/// the same names, in any order.
#[derive(Clone)]
pub struct ProcessSet(Arc<Members>);

struct Members {
    world: Arc<Inner>,
    /// The engine's number of the set: 0 for the world.
    number: u32,
    ranks: Vec<usize>,
    backend: Backend,
    /// Numbers the operations to which the user gives no name. Its upper half counts the joins.
    unnamed: AtomicU64,
}

impl ProcessSet {
    pub(super) fn new(world: Arc<Inner>, number: u32, ranks: Vec<usize>, backend: Backend) -> Self {
        ProcessSet(Arc::new(Members { world, number, ranks, backend, unnamed: AtomicU64::new(0) }))
    }

    pub(super) fn world(&self) -> &Arc<Inner> {
        &self.0.world
    }

    /// `None` for a set of one.
    fn engine(&self) -> Option<&Engine> {
        self.world().engine.as_ref().filter(|_| self.size() > 1)
    }

    /// Makes a set of some of the world's ranks, ascending, this one among them.
    pub(super) fn found(&self, ranks: Vec<usize>) -> Result<ProcessSet> {
        let world = self.world().clone();
        let Some(engine) = world.engine.as_ref().filter(|_| ranks.len() > 1) else {
            return Ok(ProcessSet::new(world.clone(), WORLD, ranks, Backend::Solo));
        };
        let _one_at_a_time = world.founding.lock();
        let made = engine.found(ranks.clone())?;
        let backend = match (made.shares, world.transport) {
            (true, _) => Backend::Shm,
            (false, over) => over,
        };
        Ok(ProcessSet::new(world.clone(), made.number as u32, ranks, backend))
    }

    /// This rank of the world, `0 .. size` of the world.
    pub fn rank(&self) -> usize {
        self.0.world.topology.rank
    }

    /// Number of ranks in the set.
    pub fn size(&self) -> usize {
        self.0.ranks.len()
    }

    /// The set's ranks of the world, ascending.
    pub fn ranks(&self) -> &[usize] {
        &self.0.ranks
    }

    /// What serves large allreduces.
    pub fn backend(&self) -> Backend {
        self.0.backend
    }

    /// Submits an operation; the engine carries it out in the background.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what no rank could do. What goes wrong later is the handle's to tell.
    pub fn submit(&self, submission: Submission) -> Result<Handle> {
        self.hand_in(submission, true)
    }

    /// Submits operations of one kind as one: they are negotiated under `name`, and none is carried out unless all ranks have
    /// submitted the same group. Their own names serve observers and errors.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what no rank could do: an empty group, or different kinds, roots or options in one.
    pub fn submit_group(&self, name: &str, submissions: Vec<Submission>) -> Result<GroupHandle> {
        self.hand_in_group(name, submissions, true)
    }

    pub(super) fn hand_in(&self, submission: Submission, flush: bool) -> Result<Handle> {
        let name = submission.name.clone();
        let mut handles = self.hand_in_entry(name, vec![submission], flush)?;
        handles.pop().ok_or_else(|| Error::Invalid("nothing was submitted".into()))
    }

    pub(super) fn hand_in_group(&self, name: &str, submissions: Vec<Submission>, flush: bool) -> Result<GroupHandle> {
        let Some(first) = submissions.first() else {
            return Err(Error::Invalid(format!("the group `{name}` is empty")));
        };
        if let Some(odd) = submissions.iter().find(|one| one.kind != first.kind || one.device != first.device) {
            return Err(Error::Invalid(format!(
                "the group `{name}` mixes {:?} on {} and {:?} on {}",
                first.kind, first.device, odd.kind, odd.device
            )));
        }
        if !first.kind.can_be_grouped() {
            return Err(Error::Invalid(format!("`{name}`: {} can't be grouped", first.kind.name())));
        }
        self.hand_in_entry(name.into(), submissions, flush).map(GroupHandle::new)
    }

    fn hand_in_entry(&self, name: String, submissions: Vec<Submission>, flush: bool) -> Result<Vec<Handle>> {
        submissions.iter().try_for_each(|submission| submission.validate(self.rank(), self.ranks()))?;
        let observers = &self.world().observers;
        submissions.iter().for_each(|submission| observers.submitted(submission));
        match self.engine() {
            Some(engine) => engine.submit(self.0.number, name, submissions, flush),
            None => {
                let carry_out = |submission| Handle::done(Ok(solo::carry_out(submission, self.rank(), observers)));
                Ok(submissions.into_iter().map(carry_out).collect())
            }
        }
    }

    /// Whether an operation may work on memory that is only borrowed. After a failure MPI may still write to memory that it
    /// was given, so it never gets such.
    pub(super) fn may_borrow(&self) -> bool {
        self.world().transport != Backend::Mpi || self.size() == 1
    }

    /// Carries out an operation in place.
    pub(super) fn run_borrowed<T: Element>(&self, name: &str, data: &mut [T], kind: OpKind) -> Result<()> {
        if !self.may_borrow() {
            let result = self.submit(owned(name.into(), data.to_vec(), kind))?.wait()?.output;
            // SAFETY: the operation is done.
            data.copy_from_slice(&unsafe { result.into_vec::<T>() });
            return Ok(());
        }
        // SAFETY: `data` stays borrowed until `wait` returns, and the engine drops its memory before it completes.
        let submission = unsafe { borrowed(name.into(), data, kind) };
        self.hand_in(submission, false)?.wait().map(drop)
    }

    /// Forgets the set: returns once all its ranks have called it. Operations that not every rank has submitted by then end
    /// with an error, as do later ones. A set that is not removed lasts as long as the world.
    ///
    /// # Errors
    /// [`Error::Invalid`] for the world itself, else what the world was lost to.
    pub fn remove(&self) -> Result<()> {
        match (self.engine(), self.0.number) {
            (Some(_), WORLD) => {
                Err(Error::Invalid("the world itself is no process set to remove; shut it down".into()))
            }
            (Some(engine), number) => engine.remove(number),
            (None, _) => Ok(()),
        }
    }

    /// Numbers unnamed operations alike on all ranks, of which some had fewer of them before they joined.
    pub(super) fn renumber(&self) {
        // Nothing else is named meanwhile: until the join is done, the engine refuses it.
        let joins = self.0.unnamed.load(Ordering::Relaxed) >> 32;
        self.0.unnamed.store((joins + 1) << 32, Ordering::Relaxed);
    }

    /// A name for an operation to which the user gives none: the same on all ranks that carry out as many of them.
    pub(super) fn unnamed(&self, what: &str) -> String {
        let number = self.0.unnamed.fetch_add(1, Ordering::Relaxed);
        match self.0.number {
            WORLD => format!("{what}.{number}"),
            set => format!("set {set}.{what}.{number}"),
        }
    }
}

/// An operation on a vector, which goes into its handle.
pub(super) fn owned<T: Element>(name: String, data: Vec<T>, kind: OpKind) -> Submission {
    let output = match kind.is_in_place() {
        true => Output::InPlace,
        false => Output::Allocate(Box::new(|bytes| Memory::from_vec(vec![T::default(); bytes / size_of::<T>()]))),
    };
    Submission::new(name, kind, T::DTYPE, vec![data.len()], Memory::from_vec(data), output)
}

/// An operation in place on a slice.
///
/// # Safety
/// `data` must stay borrowed until the operation is done.
pub(super) unsafe fn borrowed<T: Element>(name: String, data: &mut [T], kind: OpKind) -> Submission {
    let (bytes, shape) = (size_of_val(data), vec![data.len()]);
    // SAFETY: the caller vouches for it.
    let input = unsafe { Memory::from_raw_parts(NonNull::from(data).cast(), bytes, None) };
    Submission::new(name, kind, T::DTYPE, shape, input, Output::InPlace)
}

/// An operation without elements.
pub(super) fn empty(name: String, kind: OpKind) -> Submission {
    Submission::new(name, kind, DType::U8, vec![0], Memory::empty(), Output::InPlace)
}

impl std::fmt::Debug for ProcessSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ProcessSet(rank {} of {:?}, {})", self.rank(), self.ranks(), self.backend())
    }
}
