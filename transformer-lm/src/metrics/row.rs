//! The figures of an update or a validation.

use serde::Serialize;

/// Whose figures a row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Of one update, over its global batch.
    Train,
    /// Of a validation, over the whole held-out part.
    Val,
}

impl Phase {
    /// `train` or `val`, as in the files and in TensorBoard's tags.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Train => "train",
            Phase::Val => "val",
        }
    }
}

/// One row: the columns of `metrics.csv`, and what only `metrics.jsonl` and TensorBoard hold. What was not measured is left
/// out.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Training or validation.
    pub phase: Phase,
    /// The epoch, counted from 1.
    pub epoch: u64,
    /// Updates within the epoch, counted from 1.
    pub update: u64,
    /// Updates since the start of training.
    pub global_step: u64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Mean loss in nats per token.
    pub loss: f64,
    /// exp of the mean loss.
    pub perplexity: f64,
    /// Share of tokens that the model found likeliest.
    pub accuracy: Option<f64>,
    /// Tokens per second over all ranks.
    pub throughput: f64,
    /// Seconds of training so far, those before a resume included.
    pub wall_time: f64,
    /// The rest.
    #[serde(flatten)]
    pub more: Figures,
}

/// Figures beyond the columns of `metrics.csv`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Tokens that the loss is the mean of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Bits that the model needs for a byte of the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Norm of the reduced gradients before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Milliseconds of an update, the mean since the last row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_ms: Option<f64>,
    /// Model FLOPs utilisation: the model's arithmetic as a share of what the ranks' processors can do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Memory of rank 0's process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Share of the time since the last row that rank 0 waited for communication.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<f64>,
    /// Updates skipped since the start of training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<u64>,
}

impl Figures {
    /// Those that were measured, by the names that `metrics.jsonl` and TensorBoard give them.
    pub fn named(&self) -> Vec<(&'static str, f64)> {
        let pairs = [
            ("tokens", self.tokens.map(|count| count as f64)),
            ("bits_per_byte", self.bits_per_byte),
            ("grad_norm", self.grad_norm),
            ("step_ms", self.step_ms),
            ("mfu", self.mfu),
            ("memory_bytes", self.memory_bytes.map(|bytes| bytes as f64)),
            ("waiting", self.waiting),
            ("skipped", self.skipped.map(|count| count as f64)),
        ];
        pairs.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}
