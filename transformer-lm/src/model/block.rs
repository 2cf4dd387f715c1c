//! The parts of a decoder block, in GPT-2's arrangement.
//!
//! Letters in shape comments: `B` sequences, `T` tokens given, `S` tokens seen (with those in the cache), `D` width,
//! `H` heads, `hs` width of a head, `F` feed-forward width.

use tch::{Tensor, nn};

use super::cache::LayerCache;
use super::dropout::Dropout;
use super::fused::{self, Attend, Dense, LayerNormOptions};
use super::init::Init;
use super::matrix::Matrix;
use super::{ModelConfig, STD};
use crate::Result;

/// A dense layer `x·Wᵀ + b`. The weight is stored (out, in), as torch's Linear does; GPT-2's own files hold (in, out).
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) weight: Matrix,
    pub(super) bias: Tensor,
}

impl Linear {
    fn new(init: &mut Init, path: &nn::Path, inputs: usize, outputs: usize, std: f64) -> Self {
        Self {
            weight: Matrix::new(init.normal(path, "weight", &[outputs, inputs], std)),
            bias: init.constant(path, "bias", &[outputs], 0.0),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        fused::linear(x, &self.weight.values, Some(&self.bias))
    }

    fn dense(&self) -> Dense<'_> {
        Dense { weight: &self.weight.values, bias: &self.bias }
    }

    /// What the layer adds to the residual stream.
    fn branch(&self, x: Tensor, dropout: &Dropout) -> Result<Branch<'_>> {
        match dropout.is_off() {
            true => Ok(Branch::Product(x, self.dense())),
            false => Ok(Branch::Values(dropout.apply(self.forward(&x)?)?)),
        }
    }
}

/// What a part of a block adds to the residual stream, (B, T, D).
#[derive(Debug)]
enum Branch<'a> {
    Values(Tensor),
    /// What a layer makes of this; it is computed as it is added.
    Product(Tensor, Dense<'a>),
    /// What two layers make of this, with GELU between them.
    FeedForward(Tensor, [Dense<'a>; 2]),
}

/// The residual stream, (B, T, D). What a part adds to it is taken up when it is normalised for the next.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    residual: Tensor,
    branch: Option<Branch<'a>>,
}

impl Stream<'_> {
    pub(super) fn new(residual: Tensor) -> Self {
        Self { residual, branch: None }
    }

    /// The stream as a tensor.
    pub(super) fn sum(self) -> Result<Tensor> {
        match self.branch {
            None => Ok(self.residual),
            Some(Branch::Values(values)) => Ok(self.residual.f_add(&values)?),
            Some(Branch::Product(x, layer)) => fused::add_linear(&self.residual, &x, layer),
            Some(Branch::FeedForward(x, layers)) => fused::add_mlp(&self.residual, &x, layers),
        }
    }
}

/// Added to the variance in layer normalisation.
pub const LAYER_NORM_EPS: f64 = 1e-5;

/// Layer normalisation with weight and bias.
#[derive(Debug)]
pub(super) struct LayerNorm {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
}

impl LayerNorm {
    pub(super) fn new(init: &mut Init, path: &nn::Path, width: usize) -> Self {
        Self { weight: init.constant(path, "weight", &[width], 1.0), bias: init.constant(path, "bias", &[width], 0.0) }
    }

    /// The stream as a tensor, and normalised.
    pub(super) fn forward(&self, stream: Stream) -> Result<(Tensor, Tensor)> {
        let norm = LayerNormOptions { weight: &self.weight, bias: &self.bias, eps: LAYER_NORM_EPS };
        match &stream.branch {
            Some(Branch::Product(x, layer)) => fused::add_linear_norm(&stream.residual, x, *layer, norm),
            Some(Branch::FeedForward(x, layers)) => fused::add_mlp_norm(&stream.residual, x, *layers, norm),
            _ => {
                let x = stream.sum()?;
                let normal = fused::layer_norm(&x, norm)?;
                Ok((x, normal))
            }
        }
    }
}

/// The parts of a block that have dropout.
const ATTENTION_WEIGHTS: u64 = 0;
const ATTENTION: u64 = 1;
const FEED_FORWARD: u64 = 2;

#[derive(Debug)]
pub(super) struct Attention {
    pub(super) c_attn: Linear,
    pub(super) c_proj: Linear,
    heads: i64,
}

impl Attention {
    fn new(init: &mut Init, path: &nn::Path, config: &ModelConfig) -> Self {
        let d = config.d_model;
        Self {
            c_attn: Linear::new(init, &(path / "c_attn"), d, 3 * d, STD),
            c_proj: Linear::new(init, &(path / "c_proj"), d, d, residual_std(config)),
            heads: config.n_heads as i64,
        }
    }

    fn forward(
        &self,
        x: &Tensor,
        attend: &Attend,
        cache: Option<&mut LayerCache>,
        dropout: &Dropout,
    ) -> Result<Branch<'_>> {
        let qkv = self.c_attn.forward(x)?; // (B, T, 3D)
        let of_weights = dropout.at(ATTENTION_WEIGHTS);
        let y = match (attend, &cache) {
            (Attend::Causal, None) => fused::causal_attention(&qkv, self.heads as usize, &of_weights)?,
            _ => self.gather(&qkv, attend, cache, &of_weights)?,
        };
        self.c_proj.branch(y, &dropout.at(ATTENTION)) // (B, T, D)
    }

    /// What each position gathers from those that it sees: (B, T, 3D) to (B, T, D).
    fn gather(
        &self,
        qkv: &Tensor,
        attend: &Attend,
        cache: Option<&mut LayerCache>,
        dropout: &Dropout,
    ) -> Result<Tensor> {
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
        let y = fused::attention([&split[0], &k, &v], attend, dropout)?; // (B, H, T, hs)
        Ok(y.transpose(1, 2).reshape([b, t, d]))
    }
}

#[derive(Debug)]
pub(super) struct Mlp {
    pub(super) c_fc: Linear,
    pub(super) c_proj: Linear,
}

impl Mlp {
    fn new(init: &mut Init, path: &nn::Path, config: &ModelConfig) -> Self {
        let (d, ff) = (config.d_model, config.d_ff);
        Self {
            c_fc: Linear::new(init, &(path / "c_fc"), d, ff, STD),
            c_proj: Linear::new(init, &(path / "c_proj"), ff, d, residual_std(config)),
        }
    }

    fn forward(&self, x: Tensor, dropout: &Dropout) -> Result<Branch<'_>> {
        if dropout.is_off() {
            return Ok(Branch::FeedForward(x, [self.c_fc.dense(), self.c_proj.dense()]));
        }
        let hidden = fused::linear_gelu(&x, self.c_fc.dense())?; // (B, T, F)
        self.c_proj.branch(hidden, dropout) // (B, T, D)
    }
}

/// One decoder block: attention, then feed-forward, each normalised before and added to the residual stream after.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) ln_1: LayerNorm,
    pub(super) attn: Attention,
    pub(super) ln_2: LayerNorm,
    pub(super) mlp: Mlp,
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

    /// The weights of its products.
    pub(super) fn weights(&mut self) -> [&mut Matrix; 4] {
        let Self { attn, mlp, .. } = self;
        [&mut attn.c_attn, &mut attn.c_proj, &mut mlp.c_fc, &mut mlp.c_proj].map(|layer| &mut layer.weight)
    }

    /// The stream after the block.
    pub(super) fn forward(
        &self,
        stream: Stream,
        attend: &Attend,
        cache: Option<&mut LayerCache>,
        dropout: &Dropout,
    ) -> Result<Stream<'_>> {
        let (residual, normal) = self.ln_1.forward(stream)?;
        let stream = Stream { residual, branch: Some(self.attn.forward(&normal, attend, cache, dropout)?) };
        let (residual, normal) = self.ln_2.forward(stream)?;
        Ok(Stream { residual, branch: Some(self.mlp.forward(normal, &dropout.at(FEED_FORWARD))?) })
    }
}

/// Projections into the residual stream start smaller, so that its variance does not grow with depth.
fn residual_std(config: &ModelConfig) -> f64 {
    STD / ((2 * config.n_layers) as f64).sqrt()
}
