//! Figures of a model over held-out text, the same on any number of ranks.

use hvd_torch::{Autocast, ReduceOp, World};
use tch::{Device, Kind, Tensor};

use crate::config::AmpDtype;
use crate::data::{Tokenizer, ValLoader};
use crate::model::TransformerLM;
use crate::{Error, Result};

/// Sums over tokens; of one rank, then of all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    /// Summed loss in nats.
    pub loss: f64,
    /// Valid tokens.
    pub tokens: f64,
    /// Tokens that the model found likeliest.
    pub correct: f64,
    /// Bytes of text that the tokens stand for; counted in validation.
    pub bytes: f64,
}

impl Sums {
    /// Adds the sums of all ranks.
    ///
    /// # Errors
    /// [`Error::Hvd`].
    pub fn over_ranks(self, world: &World, name: &str) -> Result<Sums> {
        let values = Tensor::from_slice(&[self.loss, self.tokens, self.correct, self.bytes]);
        hvd_torch::ops::allreduce_(world, &values, name, ReduceOp::Sum)?;
        let [loss, tokens, correct, bytes] = [0, 1, 2, 3].map(|i| values.double_value(&[i]));
        Ok(Sums { loss, tokens, correct, bytes })
    }

    /// Mean loss in nats per token.
    pub fn mean_loss(&self) -> f64 {
        self.loss / self.tokens
    }

    /// Share of tokens that the model found likeliest.
    pub fn accuracy(&self) -> f64 {
        self.correct / self.tokens
    }

    /// exp of the mean loss.
    pub fn perplexity(&self) -> f64 {
        self.mean_loss().exp()
    }

    /// Bits that the model needs for a byte of text: comparable between tokenizers.
    pub fn bits_per_byte(&self) -> f64 {
        self.loss / std::f64::consts::LN_2 / self.bytes
    }
}

/// What `amp_dtype` comes to on a device.
#[derive(Clone, Copy, Debug)]
pub struct Precision {
    device: Device,
    /// Of the parameters.
    pub weights: Kind,
    /// Of products, under autocast.
    pub autocast: Option<Kind>,
    /// Whether the loss is scaled, as gradients of fp16 underflow.
    pub scaled: bool,
}

impl Precision {
    /// Precision `dtype` on `device`. On a processor that has no vectors for bf16 arithmetic, where its products would take many times
    /// as long as those of fp32, these take their place: the results are no less exact.
    ///
    /// # Errors
    /// [`Error::Config`] for one that the device lacks.
    pub fn new(dtype: AmpDtype, device: Device) -> Result<Precision> {
        let (weights, autocast) = match dtype {
            AmpDtype::Bf16 if device == Device::Cpu && !multiplies_bf16() => (Kind::Float, None),
            AmpDtype::Bf16 => (Kind::Float, Some(Kind::BFloat16)),
            AmpDtype::Fp16 => (Kind::Float, Some(Kind::Half)),
            AmpDtype::Fp32 => (Kind::Float, None),
            AmpDtype::Fp64 => (Kind::Double, None),
        };
        if dtype == AmpDtype::Fp16 && !device.is_cuda() {
            let text =
                "training.amp_dtype = fp16 needs CUDA, and this rank computes on the CPU\nhint: use bf16 or fp32";
            return Err(Error::Config(text.into()));
        }
        Ok(Precision { device, weights, autocast, scaled: dtype == AmpDtype::Fp16 })
    }

    /// What products are computed in.
    pub fn of_products(&self) -> Kind {
        self.autocast.unwrap_or(self.weights)
    }

    /// Runs a forward pass, under autocast where asked for.
    pub fn run<T>(&self, forward: impl FnOnce() -> Result<T>) -> Result<T> {
        let _guard = self.autocast.map(|kind| Autocast::enter(self.device, kind)).transpose()?;
        forward()
    }
}

/// Whether oneDNN, which computes torch's products of bf16, has kernels for this processor.
fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::is_x86_feature_detected as has;
        has!("avx512bw") && has!("avx512dq") && has!("avx512vl")
    }
    #[cfg(not(target_arch = "x86_64"))]
    true
}

/// Measures a model over the whole of a part.
#[derive(Debug)]
pub struct Evaluator {
    loader: ValLoader,
    /// Bytes of each token, by token (vocabulary).
    byte_lengths: Tensor,
    precision: Precision,
}

impl Evaluator {
    /// An evaluator of what `loader` holds, as `tokenizer` made it.
    pub fn new(loader: ValLoader, tokenizer: &Tokenizer, precision: Precision) -> Evaluator {
        let lengths: Vec<i64> = tokenizer.byte_lengths().into_iter().map(i64::from).collect();
        Evaluator { loader, byte_lengths: Tensor::from_slice(&lengths), precision }
    }

    /// Tokens that are predicted, by all ranks together.
    pub fn total_predictions(&self) -> u64 {
        self.loader.total_predictions()
    }

    /// The sums over the whole part, on every rank; each runs a share. All ranks must call it.
    ///
    /// # Errors
    /// What reading the data gives; [`Error::Hvd`].
    pub fn evaluate(&self, model: &TransformerLM, world: &World) -> Result<Sums> {
        let mut sums = Sums::default();
        for batch in self.loader.batches() {
            let batch = batch?;
            let part = tch::no_grad(|| self.precision.run(|| model.batch_loss(&batch, false, true)))?;
            sums.loss += part.loss.double_value(&[]);
            sums.tokens += part.tokens as f64;
            sums.correct += part.correct.map_or(0.0, |correct| correct.int64_value(&[]) as f64);
            sums.bytes += self.bytes(&batch);
        }
        sums.over_ranks(world, "val.sums")
    }

    /// Bytes of text that the predicted tokens of a batch (B, T+1) stand for.
    fn bytes(&self, batch: &Tensor) -> f64 {
        let targets = batch.narrow(1, 1, batch.size()[1] - 1).to_device(Device::Cpu).reshape([-1]);
        self.byte_lengths.index_select(0, &targets).sum(Kind::Int64).int64_value(&[]) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_in_what_the_device_is_quick_at() {
        let of = |dtype, device| Precision::new(dtype, device).map(|precision| precision.of_products()).ok();
        let bf16 = if multiplies_bf16() { Kind::BFloat16 } else { Kind::Float };
        assert_eq!(of(AmpDtype::Bf16, Device::Cpu), Some(bf16));
        assert_eq!(of(AmpDtype::Bf16, Device::Cuda(0)), Some(Kind::BFloat16));
        assert_eq!(of(AmpDtype::Fp32, Device::Cpu), Some(Kind::Float));
        assert_eq!(of(AmpDtype::Fp16, Device::Cpu), None);
    }
}
