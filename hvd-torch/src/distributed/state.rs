//! What the hooks and the optimizer share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hvd_core::{Allreduce, ProcessSet, ReduceOp};

use super::bucket::Bucket;
use super::sparse::SparseGradient;
use crate::error::{Error, Result};
use crate::ops;

/// Called with a parameter's name.
pub(super) type OnGradient = Box<dyn Fn(&str) + Send + Sync>;

/// The part that the hooks see. A lock, because on CUDA they run on another thread than the optimizer.
pub(super) struct Shared {
    state: Mutex<State>,
    on_gradient: Option<OnGradient>,
}

/// Between two steps: gradients arrive, are submitted, are reduced.
pub(super) struct State {
    pub set: ProcessSet,
    pub reduction: Allreduce,
    pub buckets: Vec<Bucket>,
    /// Those that are reduced as indices and values.
    pub sparse: Vec<SparseGradient>,
    /// Backward passes after which a gradient is complete.
    pub passes: usize,
    /// Whether the gradients are the reduced ones, and none has arrived since.
    pub synchronized: bool,
    /// The first thing that went wrong where nobody could be told.
    pub failure: Option<Error>,
}

/// Where a parameter's gradient is kept.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Bucket { bucket: usize, member: usize },
    Sparse(usize),
}

impl Shared {
    pub(super) fn new(state: State, on_gradient: Option<OnGradient>) -> Self {
        Shared { state: Mutex::new(state), on_gradient }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backward pass has reached a parameter. Runs inside of backward, so what goes wrong is kept for later.
    pub(super) fn fired(&self, place: Place) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if let Some(callback) = &self.on_gradient {
                let name = self.lock().name_at(place).to_string();
                callback(&name);
            }
            self.lock().fired(place)
        }));
        let failure = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => Error::invalid("a gradient hook panicked; the message is above"),
        };
        self.lock().failure.get_or_insert(failure);
    }
}

impl State {
    fn name_at(&self, place: Place) -> &str {
        match place {
            Place::Bucket { bucket, member } => &self.buckets[bucket].members[member].name,
            Place::Sparse(at) => &self.sparse[at].name,
        }
    }

    fn fired(&mut self, place: Place) -> Result<()> {
        if self.failure.is_some() {
            return Ok(());
        }
        let fired = match place {
            Place::Bucket { bucket, member } => &mut self.buckets[bucket].members[member].fired,
            Place::Sparse(at) => &mut self.sparse[at].fired,
        };
        *fired += 1;
        let (fired, passes) = (*fired, self.passes);
        if fired > passes || self.synchronized {
            return Err(too_many_passes(self.name_at(place), fired, passes, self.synchronized));
        }
        match place {
            Place::Bucket { bucket, member } => self.collect(bucket, member),
            Place::Sparse(at) if fired == passes => self.submit_sparse(at),
            Place::Sparse(_) => Ok(()),
        }
    }

    /// Takes a member's gradient into its bucket, which is submitted when that was all it waited for.
    fn collect(&mut self, bucket: usize, member: usize) -> Result<()> {
        let it = &mut self.buckets[bucket];
        it.members[member].collect()?;
        if it.members[member].fired == self.passes {
            it.waiting -= 1;
            if it.waiting == 0 {
                self.submit(bucket)?;
            }
        }
        Ok(())
    }

    /// Whether the ranks update by their own gradients and reduce the updates.
    pub(super) fn reduces_updates(&self) -> bool {
        self.reduction.op == ReduceOp::Adasum
    }

    /// Whether gradients travel. In a world of one they do not, nor where updates do.
    fn reduces_gradients(&self) -> bool {
        self.set.size() > 1 && !self.reduces_updates()
    }

    /// Starts the reduction of a bucket.
    fn submit(&mut self, bucket: usize) -> Result<()> {
        let travels = self.reduces_gradients();
        let it = &mut self.buckets[bucket];
        it.submitted = true;
        if travels {
            it.handle = Some(ops::allreduce_async_(&self.set, &it.flat, &it.name, self.reduction)?);
        }
        Ok(())
    }

    /// Starts the reduction of a gradient that stays sparse.
    fn submit_sparse(&mut self, at: usize) -> Result<()> {
        let set = self.reduces_gradients().then_some(&self.set);
        self.sparse[at].submit(set, self.reduction.op)
    }

    /// Starts what backward did not complete: parameters that were not used, or passes that did not come.
    pub(super) fn submit_rest(&mut self) -> Result<()> {
        for bucket in 0..self.buckets.len() {
            if !self.buckets[bucket].submitted {
                self.buckets[bucket].collect()?;
                self.submit(bucket)?;
            }
        }
        for at in 0..self.sparse.len() {
            if !self.sparse[at].submitted {
                self.submit_sparse(at)?;
            }
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<()> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Whether a reduction has begun that nobody has waited for.
    pub(super) fn in_flight(&self) -> bool {
        let submitted = self.buckets.iter().any(|it| it.submitted) || self.sparse.iter().any(|it| it.submitted);
        submitted && !self.synchronized
    }

    /// Whether a gradient has arrived since the last step.
    pub(super) fn has_begun(&self) -> bool {
        let members = self.buckets.iter().flat_map(|bucket| &bucket.members);
        members.map(|member| member.fired).chain(self.sparse.iter().map(|it| it.fired)).any(|fired| fired > 0)
    }

    /// The next step begins.
    pub(super) fn begin(&mut self) {
        self.synchronized = false;
        self.buckets.iter_mut().for_each(Bucket::begin);
        self.sparse.iter_mut().for_each(SparseGradient::begin);
    }
}

fn too_many_passes(name: &str, fired: usize, passes: usize, synchronized: bool) -> Error {
    let when = if synchronized { "after synchronize() and before step(), " } else { "" };
    Error::invalid(format!(
        "more backward passes than declared: {when}pass {fired} reached the parameter `{name}`, but \
         backward_passes_per_step is {passes}. Call step() after every {passes} backward pass(es), or declare the number \
         with backward_passes_per_step(n)"
    ))
}
