//! One optimizer update: forward and backward over the micro-batches, reduction, clipping, step.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use hvd_torch::{AdamW, Compression, DistributedOptimizer, Optimizer, ParamGroup, ReduceOp, ShardedAdamW, World};
use tch::{Device, Tensor, nn};

use super::evaluation::{Precision, Sums};
use super::guard::{Guard, Skip};
use super::plan::BatchPlan;
use super::profile;
use crate::checkpoint::{self, ScalerState};
use crate::config::{Config, HorovodCompression, WeightDecayOn};
use crate::model::{Backward, Dropout, ModelConfig, TransformerLM, copy_weights, read_weights};
use crate::{Error, Result};

/// fp16's first loss scale, and the updates without overflow after which it doubles; PyTorch's values.
const FIRST_SCALE: f64 = 65536.0;
const GROWTH_INTERVAL: u64 = 2000;

/// What an update did.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Over the global batch, before the update.
    pub sums: Sums,
    /// Norm of the reduced gradients before clipping; none where nobody asks for it.
    pub grad_norm: Option<f64>,
    /// Why the parameters were left as they were.
    pub skipped: Option<Skip>,
    /// Seconds that this rank waited for the others: for figures and gradients that were not there when it was done.
    pub waited: f64,
}

/// The model and what trains it.
pub struct Learner {
    /// The model.
    pub model: TransformerLM,
    /// Its optimizer, which reduces gradients over all ranks.
    pub optimizer: DistributedOptimizer<Box<dyn Optimizer>>,
    /// fp16's loss scaler.
    pub scaler: Option<ScalerState>,
    /// Decides which updates are not made.
    pub guard: Guard,
    world: World,
    /// Whether the optimizer's state is spread over the ranks.
    sharded: bool,
    /// What arithmetic runs in.
    pub precision: Precision,
    max_grad_norm: f64,
    /// Valid tokens of an update where no label is left out. Losses are divided by it before the backward pass, so that
    /// gradients have their final size while they travel.
    nominal_tokens: f64,
    /// Seed of dropout.
    seed: u64,
}

impl Learner {
    /// Makes a model with the configuration's first weights, the same on every rank.
    ///
    /// # Errors
    /// [`Error::Config`] for a precision that the device lacks.
    pub fn new(
        config: &Config,
        shape: &ModelConfig,
        plan: &BatchPlan,
        world: &World,
        device: Device,
    ) -> Result<Learner> {
        let precision = Precision::new(config.training.amp_dtype, device)?;
        let mut store = nn::VarStore::new(device);
        store.set_kind(precision.weights);
        let model = TransformerLM::new(&store.root(), shape, config.seed.0)?;
        let sharded = is_sharded(config, &model, world);
        let optimizer = DistributedOptimizer::builder(adamw(config, &model, world, sharded)?)
            .world(world.clone())
            .op(ReduceOp::Sum)
            .backward_passes_per_step(plan.accumulation)
            .compression(compression(config))
            .build()?;
        Ok(Learner {
            model,
            optimizer,
            scaler: precision.scaled.then_some(ScalerState { scale: FIRST_SCALE, good_steps: 0 }),
            guard: Guard::new(&config.training),
            world: world.clone(),
            sharded,
            precision,
            max_grad_norm: config.training.max_grad_norm,
            nominal_tokens: (plan.global * shape.max_seq_len) as f64,
            seed: config.seed.0,
        })
    }

    /// Takes the weights of a checkpoint, or of a run's best, if there is a path.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Data`]: none there, one that is damaged, or one of another model.
    pub fn init_from(&mut self, path: Option<&Path>) -> Result<()> {
        let Some(path) = path else { return Ok(()) };
        let file = checkpoint::resolve_whole(path)?.join("model.safetensors");
        copy_weights(&self.model, read_weights(&file)?, &file)
    }

    /// All ranks take rank 0's weights.
    ///
    /// # Errors
    /// [`Error::Hvd`].
    pub fn broadcast(&mut self) -> Result<()> {
        hvd_torch::ops::broadcast_parameters(&self.world, &self.model.parameters(), 0)?;
        Ok(())
    }

    /// One update from this rank's micro-batches (B, T+1) of the global batch. `step` is the number of updates before it.
    ///
    /// # Errors
    /// [`Error::Training`] where too many updates in a row had to be skipped, on all ranks alike.
    pub fn update(&mut self, batches: &[Tensor], lr: f64, step: u64, accuracy: bool) -> Result<Update> {
        self.optimizer.zero_grad()?;
        self.optimizer.set_lr(lr);
        let own = self.accumulate(batches, step, accuracy)?;
        let started = Instant::now();
        let sums = own.over_ranks(&self.world, "train.sums")?;
        self.optimizer.synchronize()?;
        let waited = started.elapsed().as_secs_f64();
        profile::mark(&self.world, profile::WAIT, started);
        let started = Instant::now();
        let factor = self.nominal_tokens / (sums.tokens * self.scale());
        if factor != 1.0 {
            self.optimizer.scale_gradients(factor)?;
        }
        let grad_norm = self.clip()?;
        let skipped = self.judge(sums.mean_loss(), grad_norm);
        if self.guard.gives_up() {
            return Err(gives_up(&self.guard, sums.mean_loss(), grad_norm, lr, step + 1));
        }
        if skipped.is_none() {
            self.optimizer.step()?;
        }
        profile::mark(&self.world, profile::OPTIMIZER, started);
        Ok(Update { sums, grad_norm, skipped, waited })
    }

    /// Clips the reduced gradients, if asked for; their norm before, if anybody wants it.
    fn clip(&mut self) -> Result<Option<f64>> {
        let clips = self.max_grad_norm > 0.0;
        if !clips && self.scaler.is_none() && !self.guard.wants_norm() {
            return Ok(None);
        }
        let limit = if clips { self.max_grad_norm } else { f64::INFINITY };
        Ok(Some(self.optimizer.clip_grad_norm(limit)?))
    }

    /// fp16 overflows now and then as its scale is sounded out: that is not the guard's matter.
    fn judge(&mut self, loss: f64, norm: Option<f64>) -> Option<Skip> {
        let finite = loss.is_finite() && norm.is_none_or(f64::is_finite);
        match self.scaler.as_mut().is_some_and(|scaler| overflowed(scaler, finite)) {
            true => Some(Skip::Overflow),
            false => self.guard.judge(loss, norm),
        }
    }

    fn scale(&self) -> f64 {
        self.scaler.map_or(1.0, |scaler| scaler.scale)
    }

    /// Forward and backward over the micro-batches; this rank's sums.
    fn accumulate(&self, batches: &[Tensor], step: u64, accuracy: bool) -> Result<Sums> {
        let mut losses = Vec::with_capacity(batches.len());
        let mut sums = Sums::default();
        for (micro, batch) in batches.iter().enumerate() {
            let rows = batch.size()[0] as u64;
            let first = (self.world.rank() * batches.len() + micro) as u64 * rows;
            let dropout = self.dropout(step, first..first + rows);
            let factor = self.scale() / self.nominal_tokens;
            let how = Backward { factor, accuracy, autocast: self.precision.autocast };
            let mut started = Instant::now();
            let part = self.model.backward_watched(batch, &how, &dropout, || {
                profile::mark(&self.world, profile::FORWARD, started);
                started = Instant::now();
            })?;
            profile::mark(&self.world, profile::BACKWARD, started);
            sums.tokens += part.tokens as f64;
            losses.push((part.loss, part.correct));
        }
        // Read after the last backward pass: on CUDA a read waits for the device.
        for (loss, correct) in losses {
            sums.loss += loss.double_value(&[]);
            sums.correct += correct.map_or(0.0, |correct| correct.int64_value(&[]) as f64);
        }
        Ok(sums)
    }

    /// Dropout of these of the global batch's sequences: the same on any rank and in any micro-batch.
    fn dropout(&self, step: u64, sequences: Range<u64>) -> Dropout {
        let key = |sequence| hvd_torch::mix(&[self.seed, step, sequence]);
        Dropout::new(self.model.config().dropout, sequences.map(key))
    }

    /// The optimizer's state by name, on rank 0. All ranks must call it.
    ///
    /// # Errors
    /// [`Error::Hvd`].
    pub fn moments(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.optimizer.inner().state()?)
    }

    /// Whether `moments` are those of this model, which rank 0 can tell alone.
    ///
    /// # Errors
    /// [`Error::Hvd`], where they are another model's.
    pub fn check_moments(&self, moments: &[(String, Tensor)]) -> Result<()> {
        Ok(self.optimizer.inner().check_state(moments)?)
    }

    /// All ranks take the optimizer's state that rank 0 gives.
    ///
    /// # Errors
    /// [`Error::Hvd`], where it is another model's.
    pub fn load_moments(&mut self, moments: &[(String, Tensor)]) -> Result<()> {
        if self.sharded {
            return Ok(self.optimizer.inner_mut().load_state(moments)?);
        }
        if self.world.rank() == 0 {
            self.optimizer.inner_mut().load_state(moments)?;
        }
        Ok(hvd_torch::ops::broadcast_optimizer_state(&self.world, self.optimizer.inner_mut(), 0)?)
    }
}

fn gives_up(guard: &Guard, loss: f64, norm: Option<f64>, lr: f64, step: u64) -> Error {
    let norm = norm.map(|norm| format!(", gradient norm {norm}")).unwrap_or_default();
    let rows = guard.state.in_a_row;
    Error::Training(format!(
        "{rows} updates in a row had to be skipped, the last at step {step} (loss {loss}{norm}, learning rate {lr:e})\n\
         hint: lower training.learning_rate or raise training.warmup_steps"
    ))
}

/// Accounts for an update whose gradients were `finite`; whether to skip it.
fn overflowed(scaler: &mut ScalerState, finite: bool) -> bool {
    scaler.good_steps = if finite { scaler.good_steps + 1 } else { 0 };
    if !finite {
        scaler.scale /= 2.0;
    } else if scaler.good_steps.is_multiple_of(GROWTH_INTERVAL) {
        scaler.scale *= 2.0;
    }
    !finite
}

/// Models with fewer parameters are not worth the messages that sharding costs.
const SHARDED_FROM: usize = 32_000_000;

fn is_sharded(config: &Config, model: &TransformerLM, world: &World) -> bool {
    let parameters: usize = model.parameters().iter().map(|(_, parameter)| parameter.numel()).sum();
    world.size() > 1 && config.distributed.shard_optimizer.unwrap_or(parameters >= SHARDED_FROM)
}

fn adamw(config: &Config, model: &TransformerLM, world: &World, sharded: bool) -> Result<Box<dyn Optimizer>> {
    let training = &config.training;
    let all = training.weight_decay_on == WeightDecayOn::All;
    let (decayed, others) = model.parameters().into_iter().partition(|(_, parameter)| all || parameter.dim() >= 2);
    let group = |params, weight_decay| ParamGroup { params, lr: training.learning_rate, weight_decay };
    let groups = vec![group(decayed, training.weight_decay), group(others, 0.0)];
    let (betas, eps) = (training.betas.into(), training.eps);
    Ok(match sharded {
        true => Box::new(ShardedAdamW::new(world.clone(), groups, betas, eps)?),
        false => Box::new(AdamW::new(groups, betas, eps)?),
    })
}

fn compression(config: &Config) -> Compression {
    match config.distributed.horovod_compression {
        HorovodCompression::None => Compression::None,
        HorovodCompression::Fp16 => Compression::Fp16,
        HorovodCompression::Bf16 => Compression::Bf16,
    }
}
