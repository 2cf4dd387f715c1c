//! `train --benchmark`: how fast updates are, on random tokens.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{BatchPlan, Learner, Setup};
use crate::config::{AmpDtype, Config, VocabSize};
use crate::{Error, Result};

/// A shape that is measured; PyTorch's program, `benches/peers/train_torch.py`, has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// 4 layers of width 128, context 64, 256 tokens, 12 sequences per rank and update.
    Tiny,
    /// 6 layers of width 384, context 256, 256 tokens, 16 sequences.
    Small,
    /// GPT-2's 124M: 12 layers of width 768, context 512, 50257 tokens, 2 sequences.
    Gpt2,
}

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Benchmark {
    /// The model's shape.
    pub preset: Preset,
    /// Precision of the arithmetic.
    pub dtype: AmpDtype,
    /// Sequences per rank and update; none: the preset's.
    pub batch: Option<usize>,
    /// Updates that are timed.
    pub steps: usize,
    /// Updates before, which are not.
    pub warmup: usize,
}

/// What was measured. The first keys are those of PyTorch's program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The shape's name.
    pub preset: String,
    /// `float32` or `bfloat16`.
    pub dtype: String,
    /// What products were computed in: another type, where the processor has no arithmetic for `dtype`.
    pub products: String,
    /// Ranks.
    pub ranks: usize,
    /// Threads of a rank.
    pub threads: usize,
    /// Sequences per rank and update.
    pub batch: usize,
    /// Median milliseconds of an update: forward, backward, reduction, clipping and AdamW.
    pub step_ms: f64,
    /// Tokens per second over all ranks.
    pub tokens_per_s: f64,
    /// Loss of the last update over all ranks, in nats per token.
    pub loss: f64,
    /// Share of the time that rank 0 waited for the other ranks.
    pub waiting: f64,
}

impl Preset {
    fn name(self) -> &'static str {
        match self {
            Preset::Tiny => "tiny",
            Preset::Small => "small",
            Preset::Gpt2 => "gpt2",
        }
    }

    /// Layers, heads, width, feed-forward width, context, vocabulary, sequences.
    fn shape(self) -> [usize; 7] {
        match self {
            Preset::Tiny => [4, 4, 128, 512, 64, 256, 12],
            Preset::Small => [6, 6, 384, 1536, 256, 256, 16],
            Preset::Gpt2 => [12, 12, 768, 3072, 512, 50257, 2],
        }
    }
}

impl Benchmark {
    /// PyTorch's program's settings: constant learning rate, decay of the matrices, clipping at 1.
    fn config(&self) -> Config {
        let mut config = Config::default();
        let [layers, heads, width, ff, context, vocabulary, _] = self.preset.shape();
        let model = &mut config.model;
        (model.n_layers, model.n_heads, model.d_model, model.d_ff) = (layers, heads, width, ff);
        (model.max_seq_len, model.vocab_size, model.dropout) = (context, VocabSize::Fixed(vocabulary), 0.0);
        let training = &mut config.training;
        (training.learning_rate, training.weight_decay, training.betas) = (3e-4, 0.1, [0.9, 0.95]);
        (training.max_grad_norm, training.amp_dtype) = (1.0, self.dtype);
        config
    }

    /// Times updates on the ranks of `setup`; every rank calls it and gets rank 0's figures.
    ///
    /// # Errors
    /// [`Error::Config`] for no steps or an empty batch; [`Error::Hvd`].
    pub fn run(&self, setup: &Setup) -> Result<Measured> {
        let batch = self.batch.unwrap_or(self.preset.shape()[6]);
        if batch == 0 || self.steps == 0 {
            return Err(Error::Config("--batch and --steps: expected at least 1".into()));
        }
        let config = self.config();
        let shape = config.model_config(0);
        let plan = BatchPlan { global: batch * setup.world_size, micro: batch, accumulation: 1 };
        let mut learner = Learner::new(&config, &shape, &plan, &setup.world, Device::Cpu)?;
        learner.broadcast()?;
        tch::manual_seed(setup.rank as i64);
        let (mut times, mut waited, mut loss) = (Vec::with_capacity(self.steps), 0.0, f64::NAN);
        for step in 0..self.warmup + self.steps {
            let size = [batch as i64, shape.max_seq_len as i64 + 1];
            let tokens = Tensor::randint(shape.vocab_size as i64, size, (Kind::Int64, Device::Cpu));
            setup.world.barrier().map_err(hvd_torch::Error::from)?;
            let started = Instant::now();
            let update = learner.update(&[tokens], config.training.learning_rate, step as u64, false)?;
            loss = update.sums.mean_loss();
            if step >= self.warmup {
                times.push(started.elapsed().as_secs_f64());
                waited += update.waited;
            }
        }
        let waiting = waited / times.iter().sum::<f64>();
        let seconds = median(&mut times);
        let tokens = (plan.global * shape.max_seq_len) as f64;
        let measured = Measured {
            preset: self.preset.name().into(),
            dtype: if self.dtype == AmpDtype::Bf16 { "bfloat16" } else { "float32" }.into(),
            products: if learner.precision.of_products() == Kind::BFloat16 { "bfloat16" } else { "float32" }.into(),
            ranks: setup.world_size,
            threads: setup.threads,
            batch,
            step_ms: 1e3 * seconds,
            tokens_per_s: tokens / seconds,
            loss,
            waiting,
        };
        Ok(setup.world.broadcast_object("benchmark", Some(measured), 0).map_err(hvd_torch::Error::from)?)
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len() % 2 == 1 { times[middle] } else { (times[middle - 1] + times[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn presets_are_models() {
        for (preset, parameters) in [(Preset::Tiny, 834_304), (Preset::Small, 10_844_160), (Preset::Gpt2, 124_046_592)]
        {
            let benchmark = Benchmark { preset, dtype: AmpDtype::Fp32, batch: None, steps: 1, warmup: 0 };
            let shape = benchmark.config().model_config(0);
            shape.validate().unwrap();
            assert_eq!(shape.parameter_count(), parameters);
        }
    }
}
