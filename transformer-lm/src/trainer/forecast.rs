//! What a run would be: `train --dry-run`.

use std::fmt;
use std::time::Instant;

use tch::{Device, Kind, Tensor, nn};

use super::plan::{BatchPlan, most_at_once, total_steps};
use super::speed::{flops_per_token, measure_peak_flops};
use super::{Precision, Setup, device_of};
use crate::config::Config;
use crate::data::load_preprocessed_data;
use crate::metrics::thousands;
use crate::model::{Backward, ModelConfig, TransformerLM};
use crate::{Error, Result};

/// A run before it is started.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Trainable numbers.
    pub parameters: usize,
    /// Bytes of weights, gradients and AdamW's moments in a rank.
    pub state_bytes: usize,
    /// Bytes of the activations that a micro-batch keeps for its backward pass, roughly.
    pub activation_bytes: usize,
    /// How an update is dealt.
    pub plan: BatchPlan,
    /// Ranks.
    pub ranks: usize,
    /// Tokens of an update over all ranks.
    pub tokens_per_step: usize,
    /// Updates that a pass over the training part takes.
    pub steps_per_epoch: u64,
    /// Updates in all.
    pub steps: u64,
    /// Floating-point operations of an update over all ranks.
    pub flops_per_step: f64,
    /// Seconds of an update, from one micro-batch that was measured; without communication.
    pub step_seconds: f64,
    /// What a rank reached in that micro-batch, as a share of a large product's speed.
    pub mfu: f64,
}

/// Forecasts the run of `config` on the ranks of `setup`: opens the data, makes the model and times a micro-batch. Nothing is
/// written.
///
/// # Errors
/// What starting the run would give.
pub fn forecast(config: &Config, setup: &Setup) -> Result<Forecast> {
    let data = load_preprocessed_data(&config.data.data_dir)?;
    let config = config.resolved(data.vocab_size)?;
    let shape = config.model_config(data.vocab_size);
    let device = device_of(config.training.device, setup)?;
    let plan = BatchPlan::new(&config.training, setup.world_size, most_at_once(device, &shape))?;
    let precision = Precision::new(config.training.amp_dtype, device)?;
    let steps_per_epoch = data.train.blocks(shape.max_seq_len) / plan.global as u64;
    if steps_per_epoch == 0 {
        let (tokens, needed) = (data.train.tokens(), plan.global * shape.max_seq_len + 1);
        let text =
            format!("{tokens} tokens are too few for an update, which takes at least {needed}; prepare more text");
        return Err(Error::data(data.train.path(), text));
    }
    let (micro_seconds, mfu) = time_micro_batch(&shape, &plan, &precision, config.seed.0, device)?;
    let tokens_per_step = plan.global * shape.max_seq_len;
    let parameters = shape.parameter_count();
    Ok(Forecast {
        parameters,
        state_bytes: 4 * parameters * bytes_of(precision.weights),
        activation_bytes: activation_bytes(&shape, plan.micro, &precision),
        plan,
        ranks: setup.world_size,
        tokens_per_step,
        steps_per_epoch,
        steps: total_steps(&config.training, steps_per_epoch),
        flops_per_step: flops_per_token(&shape) * tokens_per_step as f64,
        step_seconds: micro_seconds * plan.accumulation as f64,
        mfu,
    })
}

/// Seconds of forward and backward of a micro-batch, and what share of the peak that is.
fn time_micro_batch(
    shape: &ModelConfig,
    plan: &BatchPlan,
    precision: &Precision,
    seed: u64,
    device: Device,
) -> Result<(f64, f64)> {
    let mut store = nn::VarStore::new(device);
    store.set_kind(precision.weights);
    let model = TransformerLM::new(&store.root(), shape, seed)?;
    let size = [plan.micro as i64, shape.max_seq_len as i64 + 1];
    let batch = Tensor::randint(shape.vocab_size as i64, size, (Kind::Int64, device));
    let run = || -> Result<f64> {
        let started = Instant::now();
        let sums = model.backward(&batch, &Backward { factor: 1.0, accuracy: false, autocast: precision.autocast })?;
        sums.loss.double_value(&[]);
        Ok(started.elapsed().as_secs_f64())
    };
    run()?; // takes the memory that later ones use again
    let seconds = run()?;
    let flops = flops_per_token(shape) * (plan.micro * shape.max_seq_len) as f64;
    let peak = measure_peak_flops(device, precision.of_products());
    Ok((seconds, flops / seconds / peak))
}

/// Of a block 34 numbers for each token and unit of width in 16 bits (Korthikanti et al., 2022, without the attention matrix,
/// which is not kept), or one with checkpointing; and the logits, in f32, with their gradient.
fn activation_bytes(shape: &ModelConfig, micro: usize, precision: &Precision) -> usize {
    let tokens = micro * shape.max_seq_len;
    let width = bytes_of(precision.of_products());
    let block = 17 * tokens * shape.d_model * width;
    let input = tokens * shape.d_model * bytes_of(precision.weights);
    let blocks = if shape.gradient_checkpointing { block + shape.n_layers * input } else { shape.n_layers * block };
    blocks + 2 * tokens * shape.vocab_size * bytes_of(Kind::Float)
}

fn bytes_of(kind: Kind) -> usize {
    match kind {
        Kind::Double => 8,
        Kind::Half | Kind::BFloat16 => 2,
        _ => 4,
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| thousands(bytes as f64 / f64::from(1 << 20));
        let BatchPlan { global, micro, accumulation } = self.plan;
        writeln!(f, "parameters       {}", thousands(self.parameters as f64))?;
        writeln!(
            f,
            "memory of a rank {} MiB of weights, gradients and moments, about {} MiB of activations",
            mib(self.state_bytes),
            mib(self.activation_bytes)
        )?;
        writeln!(
            f,
            "an update        {global} sequences = {} ranks x {accumulation} micro-batches x {micro}; {} tokens, {:.2e} operations",
            self.ranks,
            thousands(self.tokens_per_step as f64),
            self.flops_per_step
        )?;
        let epochs = self.steps as f64 / self.steps_per_epoch as f64;
        writeln!(
            f,
            "updates          {} of which {} are an epoch: {epochs:.2} epochs",
            self.steps, self.steps_per_epoch
        )?;
        let total = self.step_seconds * self.steps as f64;
        write!(
            f,
            "estimated time   {:.3} s an update (MFU {:.1} %), {:.2} h in all, without communication and validation",
            self.step_seconds,
            100.0 * self.mfu,
            total / 3600.0
        )
    }
}
