//! The parts of a decoder block, in GPT-2's arrangement.
//!
//! Letters in shape comments: `B` sequences, `T` tokens given, `S` tokens seen (with those in the cache), `D` width,
//! `H` heads, `hs` width of a head, `F` feed-forward width.

use tch::{Tensor, nn};

use super::cache::LayerCache;
use super::fused;
use super::init::Init;
use super::{ModelConfig, STD};
use crate::Result;

/// A dense layer `x·Wᵀ + b`. The weight is stored (out, in), as torch's Linear does; GPT-2's own files hold (in, out).
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn new(init: &mut Init, path: &nn::Path, inputs: usize, outputs: usize, std: f64) -> Self {
        Self {
            weight: init.normal(path, "weight", &[outputs, inputs], std),
            bias: init.constant(path, "bias", &[outputs], 0.0),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }
}

/// Added to the variance in layer normalisation.
pub const LAYER_NORM_EPS: f64 = 1e-5;

/// Layer normalisation with weight and bias.
#[derive(Debug)]
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    width: i64,
}

impl LayerNorm {
    pub(super) fn new(init: &mut Init, path: &nn::Path, width: usize) -> Self {
        Self {
            weight: init.constant(path, "weight", &[width], 1.0),
            bias: init.constant(path, "bias", &[width], 0.0),
            width: width as i64,
        }
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm([self.width], Some(&self.weight), Some(&self.bias), LAYER_NORM_EPS, true)
    }
}

/// Who may look at whom.
#[derive(Debug)]
pub(super) enum Attend {
    /// Each position sees itself and those before it; nothing is cached.
    Causal,
    /// Every position sees all: a single new token and its past.
    All,
    /// True where a query (row) may see a key (column); broadcasts to (B, H, T, S).
    Masked(Tensor),
}

#[derive(Debug)]
struct Attention {
    c_attn: Linear,
    c_proj: Linear,
    heads: i64,
    dropout: f64,
}

impl Attention {
    fn new(init: &mut Init, path: &nn::Path, config: &ModelConfig) -> Self {
        let d = config.d_model;
        Self {
            c_attn: Linear::new(init, &(path / "c_attn"), d, 3 * d, STD),
            c_proj: Linear::new(init, &(path / "c_proj"), d, d, residual_std(config)),
            heads: config.n_heads as i64,
            dropout: config.dropout,
        }
    }

    fn forward(&self, x: &Tensor, attend: &Attend, cache: Option<&mut LayerCache>, train: bool) -> Result<Tensor> {
        let qkv = self.c_attn.forward(x); // (B, T, 3D)
        let drops = train && self.dropout > 0.0;
        let y = match (attend, &cache) {
            (Attend::Causal, None) if !drops => fused::causal_attention(&qkv, self.heads as usize)?,
            _ => self.gather(&qkv, attend, cache, train),
        };
        Ok(dropout(self.c_proj.forward(&y), self.dropout, train)) // (B, T, D)
    }

    /// What each position gathers from those that it sees: (B, T, 3D) to (B, T, D).
    fn gather(&self, qkv: &Tensor, attend: &Attend, cache: Option<&mut LayerCache>, train: bool) -> Tensor {
        let (b, t, d) = (qkv.size()[0], qkv.size()[1], qkv.size()[2] / 3);
        let split: Vec<Tensor> = qkv
            .split(d, 2) // three of (B, T, D)
            .iter()
            .map(|part| part.view([b, t, self.heads, d / self.heads]).transpose(1, 2)) // (B, H, T, hs)
            .collect();
        let (k, v) = match cache {
            Some(cache) => cache.append(&split[1], &split[2]), // (B, H, S, hs)
            None => (split[1].shallow_clone(), split[2].shallow_clone()),
        };
        let y = self.attend(&split[0], &k, &v, attend, train); // (B, H, T, hs)
        y.transpose(1, 2).reshape([b, t, d])
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, attend: &Attend, train: bool) -> Tensor {
        let (mask, causal) = match attend {
            Attend::Causal => (None, true),
            Attend::All => (None, false),
            Attend::Masked(mask) => (Some(mask), false),
        };
        let dropout = if train { self.dropout } else { 0.0 };
        Tensor::scaled_dot_product_attention(q, k, v, mask, dropout, causal, None, false)
    }
}

#[derive(Debug)]
struct Mlp {
    c_fc: Linear,
    c_proj: Linear,
    dropout: f64,
}

impl Mlp {
    fn new(init: &mut Init, path: &nn::Path, config: &ModelConfig) -> Self {
        let (d, ff) = (config.d_model, config.d_ff);
        Self {
            c_fc: Linear::new(init, &(path / "c_fc"), d, ff, STD),
            c_proj: Linear::new(init, &(path / "c_proj"), ff, d, residual_std(config)),
            dropout: config.dropout,
        }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let hidden = fused::gelu(&self.c_fc.forward(x))?; // (B, T, F)
        Ok(dropout(self.c_proj.forward(&hidden), self.dropout, train)) // (B, T, D)
    }
}

/// One decoder block: attention, then feed-forward, each normalised before and added to the residual stream after.
#[derive(Debug)]
pub(super) struct Block {
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    pub(super) fn new(init: &mut Init, path: &nn::Path, config: &ModelConfig) -> Self {
        Self {
            ln_1: LayerNorm::new(init, &(path / "ln_1"), config.d_model),
            attn: Attention::new(init, &(path / "attn"), config),
            ln_2: LayerNorm::new(init, &(path / "ln_2"), config.d_model),
            mlp: Mlp::new(init, &(path / "mlp"), config),
        }
    }

    /// (B, T, D) to (B, T, D).
    pub(super) fn forward(
        &self,
        x: Tensor,
        attend: &Attend,
        cache: Option<&mut LayerCache>,
        train: bool,
    ) -> Result<Tensor> {
        let x = &x + self.attn.forward(&self.ln_1.forward(&x), attend, cache, train)?;
        Ok(&x + self.mlp.forward(&self.ln_2.forward(&x), train)?)
    }
}

/// Projections into the residual stream start smaller, so that its variance does not grow with depth.
fn residual_std(config: &ModelConfig) -> f64 {
    STD / ((2 * config.n_layers) as f64).sqrt()
}

/// Dropout that costs nothing where there is none.
pub(super) fn dropout(x: Tensor, probability: f64, train: bool) -> Tensor {
    if train && probability > 0.0 { x.dropout(probability, true) } else { x }
}
