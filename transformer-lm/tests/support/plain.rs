//! The functions of [`transformer_lm::model::fused`] by torch's, to be compared with in f64, and values for them.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Reduction, Tensor};
use transformer_lm::model::Dropout;
use transformer_lm::model::fused::{Dense, LayerNormOptions};

/// What `draw` draws from `seed`, so that a failing case can be run again. The tests' threads share one generator.
pub fn drawn(seed: i64, draw: impl FnOnce() -> Tensor) -> Tensor {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    draw()
}

pub fn values(seed: i64, shape: &[i64], scale: f64) -> Tensor {
    drawn(seed, || Tensor::randn(shape, (Kind::Double, Device::Cpu))) * scale
}

/// The greatest difference, relative to the greatest value expected.
pub fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    let size = expected.abs().max().double_value(&[]).max(1e-30);
    (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[]) / size
}

pub fn leaf(tensor: &Tensor, kind: Kind) -> Tensor {
    tensor.to_kind(kind).detach().copy().set_requires_grad(true)
}

/// Dropout of so many sequences.
pub fn dropout(probability: f64, sequences: i64) -> Dropout {
    Dropout::new(probability, (0..sequences as u64).map(|sequence| 1000 + sequence))
}

/// What dropout multiplies elements of this shape by, in f64.
pub fn factors(dropout: &Dropout, shape: &[i64]) -> Tensor {
    dropout.apply(Tensor::ones(shape, (Kind::Double, Device::Cpu))).unwrap()
}

/// Queries, keys and values beside each other, by plain products and a softmax.
pub fn plain_attention(qkv: &Tensor, heads: i64, dropout: &Dropout) -> Tensor {
    let (b, t, d) = (qkv.size()[0], qkv.size()[1], qkv.size()[2] / 3);
    let part = |at: i64| qkv.narrow(2, at * d, d).reshape([b, t, heads, d / heads]).transpose(1, 2); // (B, H, T, hs)
    let scores = part(0).matmul(&part(1).transpose(2, 3)) / ((d / heads) as f64).sqrt();
    let hidden = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).tril(0).logical_not();
    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double);
    let weights = &weights * factors(dropout, &weights.size()); // (B, H, T, T)
    weights.matmul(&part(2)).transpose(1, 2).reshape([b, t, d])
}

pub fn dense(parameters: &[Tensor]) -> Dense<'_> {
    Dense { weight: &parameters[0], bias: &parameters[1] }
}

pub fn norm(parameters: &[Tensor], eps: f64) -> LayerNormOptions<'_> {
    LayerNormOptions { weight: &parameters[0], bias: &parameters[1], eps }
}

pub fn plain_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Tensor {
    let centred = x - x.mean_dim(-1, true, Kind::Double);
    let variance = centred.square().mean_dim(-1, true, Kind::Double);
    centred / (variance + eps).sqrt() * weight + bias
}

pub fn plain_loss(hidden: &Tensor, weight: &Tensor, targets: &Tensor, smoothing: f64) -> Tensor {
    hidden.linear::<Tensor>(weight, None).cross_entropy_loss::<Tensor>(targets, None, Reduction::Sum, -100, smoothing)
}

/// Targets in the vocabulary; about a fourth left out.
pub fn some_targets(seed: i64, rows: i64, vocabulary: i64) -> Tensor {
    let ids = some_ids(seed, rows, vocabulary);
    let left_out = drawn(seed, || Tensor::rand([rows], (Kind::Float, Device::Cpu))).lt(0.25);
    ids.masked_fill(&left_out, -100)
}

pub fn some_ids(seed: i64, rows: i64, vocabulary: i64) -> Tensor {
    drawn(seed + 1, || Tensor::randint(vocabulary, [rows], (Kind::Int64, Device::Cpu)))
}
