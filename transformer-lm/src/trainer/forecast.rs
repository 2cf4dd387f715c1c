//! What a run would be: `train --dry-run`.

use std::fmt;
use std::time::Instant;

use tch::{Device, Kind, Tensor, nn};

use super::plan::{BatchPlan, most_at_once, total_steps};
use super::speed::{flops_per_token, measure_peak_flops};
use super::{Precision, Setup, device_of};
use crate::config::{Config, VocabSize};
use crate::data::{GPT2_VOCABULARY, TokenDataset, load_preprocessed_data, preparation};
use crate::metrics::{count, thousands};
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
    /// Updates that a pass over the training part takes; none where the data is missing.
    pub steps_per_epoch: Option<u64>,
    /// Updates in all; none where only the missing data can tell.
    pub steps: Option<u64>,
    /// What is assumed in place of missing data, and how to make it.
    pub missing_data: Option<String>,
    /// Floating-point operations of an update over all ranks.
    pub flops_per_step: f64,
    /// Seconds of an update, from one micro-batch that was measured; without communication.
    pub step_seconds: f64,
    /// What a rank reached in that micro-batch, as a share of a large product's speed.
    pub mfu: f64,
}

/// Forecasts the run of `config` on the ranks of `setup`: opens the data, makes the model and times a micro-batch. Nothing is
/// written. Where the data's folder is missing, the plan is for what the configuration says of it.
///
/// # Errors
/// What starting the run would give, but for missing data.
pub fn forecast(config: &Config, setup: &Setup) -> Result<Forecast> {
    let folder = &config.data.data_dir;
    let data = folder.is_dir().then(|| load_preprocessed_data(folder)).transpose()?;
    let vocabulary = data.as_ref().map_or_else(|| assumed_vocabulary(config), |data| data.vocab_size);
    let missing_data = data.is_none().then(|| missing_data(config, vocabulary));
    let config = config.resolved(vocabulary)?;
    let shape = config.model_config(vocabulary);
    let device = device_of(config.training.device, setup)?;
    let plan = BatchPlan::new(&config.training, setup.world_size, most_at_once(device, &shape))?;
    let precision = Precision::new(config.training.amp_dtype, device)?;
    let steps_per_epoch = data.map(|data| steps_per_epoch(&data.train, plan.global, shape.max_seq_len)).transpose()?;
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
        steps: steps_per_epoch.map(|steps| total_steps(&config.training, steps)).or(config.training.max_steps),
        missing_data,
        flops_per_step: flops_per_token(&shape) * tokens_per_step as f64,
        step_seconds: micro_seconds * plan.accumulation as f64,
        mfu,
    })
}

/// Whole updates in the training part, at least one.
fn steps_per_epoch(train: &TokenDataset, global_batch: usize, context: usize) -> Result<u64> {
    let steps = train.blocks(context) / global_batch as u64;
    if steps == 0 {
        let (tokens, needed) = (train.tokens(), global_batch * context + 1);
        let text =
            format!("{tokens} tokens are too few for an update, which takes at least {needed}; prepare more text");
        return Err(Error::data(train.path(), text));
    }
    Ok(steps)
}

/// The configuration's vocabulary, or one that the padding token is the last of, or the smallest that is usual: of bytes.
fn assumed_vocabulary(config: &Config) -> usize {
    match (config.model.vocab_size, config.model.pad_token_id) {
        (VocabSize::Fixed(size), _) => size,
        (VocabSize::Auto, Some(last)) => last.unsigned_abs() as usize + 1,
        (VocabSize::Auto, None) => 256,
    }
}

/// The tokenizer that a configuration's vocabulary gives away: GPT-2's is often filled up to a multiple of 64.
fn likely_tokenizer(config: &Config) -> Option<&'static str> {
    let is_open = config.model.vocab_size == VocabSize::Auto && config.model.pad_token_id.is_none();
    match assumed_vocabulary(config) {
        _ if is_open => None,
        256 => Some("byte"),
        size if (GPT2_VOCABULARY..=GPT2_VOCABULARY.next_multiple_of(64)).contains(&size) => Some("gpt2"),
        _ => None,
    }
}

fn missing_data(config: &Config, vocabulary: usize) -> String {
    let folder = config.data.data_dir.display();
    let command = preparation(&config.data.data_dir, likely_tokenizer(config));
    format!("{folder} is missing, a vocabulary of {vocabulary} assumed; make it with `{command}`")
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
        if let Some(missing) = &self.missing_data {
            writeln!(f, "data             {missing}")?;
        }
        writeln!(f, "parameters       {}", thousands(self.parameters as f64))?;
        writeln!(
            f,
            "memory of a rank {} MiB of weights, gradients and moments, about {} MiB of activations",
            mib(self.state_bytes),
            mib(self.activation_bytes)
        )?;
        writeln!(
            f,
            "an update        {} = {} x {} x {micro}; {} tokens, {:.2e} operations",
            count(global, "sequence"),
            count(self.ranks, "rank"),
            count(accumulation, "micro-batch"),
            thousands(self.tokens_per_step as f64),
            self.flops_per_step
        )?;
        match (self.steps, self.steps_per_epoch) {
            (Some(steps), Some(epoch)) => {
                let epochs = steps as f64 / epoch as f64;
                writeln!(f, "updates          {steps} of which {epoch} are an epoch: {epochs:.2} epochs")?;
            }
            (Some(steps), None) => writeln!(f, "updates          {steps}; how many are an epoch, the data will tell")?,
            (None, _) => writeln!(f, "updates          as the data will tell: the configuration counts epochs")?,
        }
        let hours = |steps| format!(", {:.2} h in all", self.step_seconds * steps as f64 / 3600.0);
        write!(
            f,
            "estimated time   {:.3} s an update (MFU {:.1} %){}, without communication and validation",
            self.step_seconds,
            100.0 * self.mfu,
            self.steps.map(hours).unwrap_or_default()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_is_the_one_that_the_recipe_names() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let recipes = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut known = 0;
        for path in recipes {
            let text = std::fs::read_to_string(&path).unwrap();
            let named = text.split("--tokenizer ").nth(1).unwrap().split(' ').next().unwrap();
            let found = likely_tokenizer(&Config::load(Some(&path), &[]).unwrap());
            assert!(found.is_none_or(|found| found == named), "{}: {found:?}", path.display());
            known += usize::from(found.is_some());
        }
        assert_eq!(known, 4);
    }
}
