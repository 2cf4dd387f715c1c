//! What the hooks and the optimizer share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hvd_core::{Allreduce, ProcessSet, ReduceOp};

use super::bucket::Bucket;
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
    /// Backward passes after which a gradient is complete.
    pub passes: usize,
    /// Whether the gradients are the reduced ones, and none has arrived since.
    pub synchronized: bool,
    /// The first thing that went wrong where nobody could be told.
    pub failure: Option<Error>,
}

impl Shared {
    pub(super) fn new(state: State, on_gradient: Option<OnGradient>) -> Self {
        Shared { state: Mutex::new(state), on_gradient }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backward pass has reached a parameter. Runs inside of backward, so what goes wrong is kept for later.
    pub(super) fn fired(&self, bucket: usize, member: usize) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if let Some(callback) = &self.on_gradient {
                let name = self.lock().buckets[bucket].members[member].name.clone();
                callback(&name);
            }
            self.lock().fired(bucket, member)
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
    fn fired(&mut self, bucket: usize, member: usize) -> Result<()> {
        if self.failure.is_some() {
            return Ok(());
        }
        let (passes, synchronized) = (self.passes, self.synchronized);
        let it = &mut self.buckets[bucket];
        let member = &mut it.members[member];
        member.fired += 1;
        if member.fired > passes || synchronized {
            return Err(too_many_passes(&member.name, member.fired, passes, synchronized));
        }
        member.collect()?;
        if member.fired == passes {
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

    /// Starts the reduction of a bucket. In a world of one there is none.
    pub(super) fn submit(&mut self, bucket: usize) -> Result<()> {
        let it = &mut self.buckets[bucket];
        it.submitted = true;
        if self.set.size() > 1 && self.reduction.op != ReduceOp::Adasum {
            it.handle = Some(ops::allreduce_async_(&self.set, &it.flat, &it.name, self.reduction)?);
        }
        Ok(())
    }

    /// Starts what backward did not complete: parameters that were not used, or passes that did not come.
    pub(super) fn submit_rest(&mut self) -> Result<()> {
        for bucket in 0..self.buckets.len() {
            if !self.buckets[bucket].submitted {
                self.buckets[bucket].collect()?;
                self.submit(bucket)?;
            }
        }
        Ok(())
    }

    pub(super) fn check(&self) -> Result<()> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Whether a reduction has begun that nobody has waited for.
    pub(super) fn in_flight(&self) -> bool {
        !self.synchronized && self.buckets.iter().any(|bucket| bucket.submitted)
    }

    /// Whether a gradient has arrived since the last step.
    pub(super) fn has_begun(&self) -> bool {
        self.buckets.iter().any(|bucket| bucket.members.iter().any(|member| member.fired > 0))
    }

    /// The next step begins.
    pub(super) fn begin(&mut self) {
        self.synchronized = false;
        self.buckets.iter_mut().for_each(Bucket::begin);
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
