//! What a model is made of.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How a model tells positions apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// A trained vector for each position, as in GPT-2.
    #[default]
    Learned,
    /// Fixed sines and cosines of growing wavelengths (Vaswani et al., 2017, section 3.5), added as they are.
    Sinusoidal,
}

/// The shape of a [`TransformerLM`](super::TransformerLM) and how it is trained. The default is GPT-2's 124M.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Number of different tokens: rows of the embedding, columns of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Attention heads of a layer; divides `d_model`.
    pub n_heads: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Width inside a block's feed-forward part.
    pub d_ff: usize,
    /// Longest sequence that the model can see, in tokens.
    pub max_seq_len: usize,
    /// How positions are told apart.
    pub positions: Positions,
    /// Probability that an activation is zeroed in training, in `[0, 1)`.
    pub dropout: f64,
    /// Fills the rows of a batch that `generate` ended early; without it the end token does. May lie outside the
    /// vocabulary: the model never sees it.
    pub pad_token_id: Option<i64>,
    /// Share of the target's probability that the loss of training spreads over the whole vocabulary, in `[0, 1)`.
    pub label_smoothing: f64,
    /// Whether [`TransformerLM::backward`](super::TransformerLM::backward) recomputes activations instead of keeping them.
    pub gradient_checkpointing: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50257,
            d_model: 768,
            n_heads: 12,
            n_layers: 12,
            d_ff: 3072,
            max_seq_len: 512,
            positions: Positions::Learned,
            dropout: 0.1,
            pad_token_id: Some(50256),
            label_smoothing: 0.0,
            gradient_checkpointing: false,
        }
    }
}

impl ModelConfig {
    /// Refuses what no model can be built from; the error names the field.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("n_layers", self.n_layers),
            ("d_ff", self.d_ff),
            ("max_seq_len", self.max_seq_len),
        ];
        for (name, value) in sizes {
            if value == 0 || value > i32::MAX as usize {
                return Err(Error::Config(format!("model.{name} = {value}: expected 1 to {}", i32::MAX)));
            }
        }
        if !self.d_model.is_multiple_of(self.n_heads) {
            let (width, heads) = (self.d_model, self.n_heads);
            return Err(Error::Config(format!("model.n_heads = {heads} does not divide model.d_model = {width}")));
        }
        for (name, share) in [("dropout", self.dropout), ("label_smoothing", self.label_smoothing)] {
            if !(0.0..1.0).contains(&share) {
                return Err(Error::Config(format!("model.{name} = {share}: expected 0 or more and less than 1")));
            }
        }
        Ok(())
    }

    /// Trainable numbers of the positions.
    pub fn position_parameter_count(&self) -> usize {
        match self.positions {
            Positions::Learned => self.max_seq_len * self.d_model,
            Positions::Sinusoidal => 0,
        }
    }

    /// Number of trainable numbers; the head shares the embedding's. [`usize::MAX`] stands for all that is more.
    pub fn parameter_count(&self) -> usize {
        let [d, ff, vocabulary, layers] =
            [self.d_model, self.d_ff, self.vocab_size, self.n_layers].map(|size| size as u128);
        let attention = (d * 3 * d + 3 * d) + (d * d + d);
        let feed_forward = (d * ff + ff) + (ff * d + d);
        let norm = 2 * d;
        let positions = self.position_parameter_count() as u128;
        let count = positions + vocabulary * d + layers * (attention + feed_forward + 2 * norm) + norm;
        usize::try_from(count).unwrap_or(usize::MAX)
    }
}
