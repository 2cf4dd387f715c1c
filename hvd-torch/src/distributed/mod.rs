//! An optimizer that averages gradients over all ranks while backward is still running.

mod adasum;
mod bucket;
mod builder;
mod plan;
mod sparse;
mod state;

pub use builder::Builder;

use std::sync::Arc;

use tch::Tensor;

use crate::autograd::{Hook, set_grad};
use crate::error::{Error, Result};
use crate::foreach;
use crate::optim::Optimizer;
use bucket::Bucket;
use sparse::SparseGradient;
use state::Shared;

/// Wraps an optimizer so that it updates with gradients that are averaged over all ranks.
///
/// The gradients live in a few flat buckets. A hook on each parameter counts backward passes; when all gradients of a
/// bucket are complete, its reduction starts, while backward goes on with earlier layers. Buckets depend on the
/// parameters and the settings alone, so results have the same bits on every run.
///
/// The usual step is
/// ```text
/// optimizer.zero_grad()?;
/// loss.backward();                       // as often as backward_passes_per_step says
/// optimizer.clip_grad_norm(1.0)?;        // if wanted; waits for the reductions
/// optimizer.step()?;                     // waits for the reductions
/// ```
/// Parameters that are declared [`sparse`](Builder::sparse) have no place in a bucket: their gradients travel as indices and
/// values, when they are complete. The other gradients are dense.
///
/// A parameter that no backward pass reaches has a gradient of zeros, here and on the other ranks' average.
pub struct DistributedOptimizer<O: Optimizer> {
    optimizer: O,
    name: String,
    shared: Arc<Shared>,
    /// Whether `step` leaves the gradients as they are.
    skips: bool,
    /// Dropping them removes the hooks.
    _hooks: Vec<Hook>,
}

impl<O: Optimizer> DistributedOptimizer<O> {
    /// Starts to describe a distributed optimizer around `optimizer`.
    pub fn builder(optimizer: O) -> Builder<O> {
        Builder::new(optimizer)
    }

    /// Waits until the gradients are reduced; starts the reductions that backward has not started.
    ///
    /// Every rank must call this (or [`DistributedOptimizer::step`]) equally often.
    ///
    /// # Errors
    /// If a reduction fails, or there were more backward passes than declared.
    pub fn synchronize(&mut self) -> Result<()> {
        let (dense, sparse): (Vec<_>, Vec<_>) = {
            let mut state = self.shared.lock();
            state.check()?;
            if state.synchronized {
                return Ok(());
            }
            state.submit_rest()?;
            let sparse = |it: &mut SparseGradient| Some((it.param.shallow_clone(), it.handle.take()?));
            let dense = state.buckets.iter_mut().filter_map(|bucket| bucket.handle.take()).collect();
            (dense, state.sparse.iter_mut().filter_map(sparse).collect())
        };
        // Wait for all, also after an error: the first one is what the caller gets.
        let dense = dense.into_iter().map(|handle| handle.wait().map(drop));
        let sparse = sparse.into_iter().map(|(param, handle)| set_grad(&param, Some(&handle.wait()?)));
        let outcome = dense.chain(sparse).fold(Ok(()), Result::and);
        let mut state = self.shared.lock();
        match &outcome {
            Ok(()) => state.synchronized = true,
            Err(error) => state.failure = Some(error.clone()),
        }
        outcome
    }

    /// Scales the reduced gradients so that their norm is at most `max_norm`; the norm that they had.
    ///
    /// The norm is over all parameters, summed in f64 in a fixed order: the same bits on every rank. If it is infinite or
    /// NaN the gradients stay as they are. Synchronizes first if that has not been done.
    pub fn clip_grad_norm(&mut self, max_norm: f64) -> Result<f64> {
        self.synchronize()?;
        let gradients = self.gradients()?;
        let norm = foreach::total_norm(&gradients)?;
        foreach::clip_(&gradients, norm, max_norm)?;
        Ok(norm)
    }

    /// Multiplies the reduced gradients by `factor`. Synchronizes first if that has not been done.
    pub fn scale_gradients(&mut self, factor: f64) -> Result<()> {
        self.synchronize()?;
        foreach::mul_(&self.gradients()?, factor)
    }

    /// Updates the parameters with the reduced gradients. Synchronizes first if that has not been done.
    pub fn step(&mut self) -> Result<()> {
        match self.skips {
            true => self.check_idle("step() in skip_synchronize()")?,
            false => self.synchronize()?,
        }
        let (adasum, set) = {
            let state = self.shared.lock();
            (state.reduces_updates() && state.set.size() > 1, state.set.clone())
        };
        match adasum {
            true => adasum::step(&mut self.optimizer, &set, &self.name)?,
            false => self.optimizer.step()?,
        }
        self.shared.lock().begin();
        Ok(())
    }

    /// Runs `body`, in which [`DistributedOptimizer::step`] takes the gradients as they are. For Horovod's users: here,
    /// `step` after [`DistributedOptimizer::synchronize`] does not synchronize again anyway.
    ///
    /// A step while gradients are being reduced is an error.
    pub fn skip_synchronize<R>(&mut self, body: impl FnOnce(&mut Self) -> R) -> R {
        let before = std::mem::replace(&mut self.skips, true);
        let result = body(self);
        self.skips = before;
        result
    }

    /// Removes the gradients, so that those of the next step begin anew: nobody need write zeros only to add to them. After
    /// [`DistributedOptimizer::synchronize`] without a step, this skips the step.
    ///
    /// # Errors
    /// While reductions are under way.
    pub fn zero_grad(&mut self) -> Result<()> {
        self.check_idle("zero_grad()")?;
        let mut state = self.shared.lock();
        state.buckets.iter().try_for_each(Bucket::clear)?;
        state.sparse.iter().try_for_each(|it| set_grad(&it.param, None))?;
        state.begin();
        Ok(())
    }

    /// Changes after how many backward passes a gradient is complete. Call it between steps: once gradients have
    /// arrived, or with 0, the next synchronization fails.
    pub fn set_backward_passes_per_step(&mut self, passes: usize) {
        let mut state = self.shared.lock();
        if passes == state.passes {
            return;
        }
        let before = state.passes;
        let wrong = match passes {
            0 => "but must be at least 1",
            _ if state.has_begun() && !state.synchronized => "in the middle of a step",
            _ => "",
        };
        if !wrong.is_empty() {
            let text = format!("backward_passes_per_step was changed from {before} to {passes}, {wrong}");
            state.failure.get_or_insert(Error::invalid(text));
            return;
        }
        state.passes = passes;
    }

    /// The wrapped optimizer.
    pub fn inner(&self) -> &O {
        &self.optimizer
    }

    /// The wrapped optimizer, for instance to set the learning rate or to load state. Leave its `step` and `zero_grad`
    /// to this type.
    pub fn inner_mut(&mut self) -> &mut O {
        &mut self.optimizer
    }

    /// Sets the learning rate of all parameter groups.
    pub fn set_lr(&mut self, lr: f64) {
        self.optimizer.set_lr(lr);
    }

    /// The names of each bucket's parameters, in the order in which the buckets are filled. Sparse ones are in none.
    pub fn buckets(&self) -> Vec<Vec<String>> {
        let names = |bucket: &Bucket| bucket.members.iter().map(|member| member.name.clone()).collect();
        self.shared.lock().buckets.iter().map(names).collect()
    }

    /// Refuses `what` while gradients are being reduced.
    fn check_idle(&self, what: &str) -> Result<()> {
        let state = self.shared.lock();
        state.check()?;
        match state.in_flight() {
            true => Err(Error::invalid(format!(
                "{what} while gradients are being reduced; call step() (or synchronize()) first"
            ))),
            false => Ok(()),
        }
    }

    /// What holds the elements of all gradients.
    fn gradients(&self) -> Result<Vec<Tensor>> {
        let state = self.shared.lock();
        let flats = state.buckets.iter().map(|bucket| Ok(bucket.flat.shallow_clone()));
        flats.chain(state.sparse.iter().filter_map(|it| it.values().transpose())).collect()
    }
}
