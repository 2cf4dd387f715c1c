//! Layers that work together over all ranks.

use std::borrow::Borrow;

use hvd_core::{ProcessSet, ReduceOp};
use tch::nn::{Init, ModuleT, Path};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::ops;

/// Settings of a [`SyncBatchNorm`]; the defaults are torch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyncBatchNormConfig {
    /// Added to the variance.
    pub eps: f64,
    /// The weight of a batch in the running statistics.
    pub momentum: f64,
    /// Whether there are a weight and a bias for each channel.
    pub affine: bool,
    /// Whether running statistics are kept, with which evaluation normalizes; else it uses the batch's.
    pub track_running_stats: bool,
}

impl Default for SyncBatchNormConfig {
    fn default() -> Self {
        SyncBatchNormConfig { eps: 1e-5, momentum: 0.1, affine: true, track_running_stats: true }
    }
}

/// Batch normalization over the batches of all ranks together (Ioffe and Szegedy 2015), of inputs (N, C, ...) on any device.
/// Ranks may have batches of different sizes.
///
/// In training it is one allreduce of 2 C + 1 numbers forward and one backward: all ranks must call it equally often.
/// Gradients are those of the sum of all ranks' losses, see [`crate::ops`]; under a [`crate::DistributedOptimizer`] that is
/// batch normalization of the global batch.
#[derive(Debug)]
pub struct SyncBatchNorm {
    set: ProcessSet,
    name: String,
    config: SyncBatchNormConfig,
    channels: i64,
    /// (C)
    weight: Option<Tensor>,
    /// (C)
    bias: Option<Tensor>,
    /// Mean and variance, (C) each.
    running: Option<(Tensor, Tensor)>,
}

impl SyncBatchNorm {
    /// A layer for `channels` channels whose variables lie at `path`, which also names its reductions: the same on all ranks.
    pub fn new<'a>(
        path: impl Borrow<Path<'a>>,
        set: &ProcessSet,
        channels: i64,
        config: SyncBatchNormConfig,
    ) -> SyncBatchNorm {
        let path = path.borrow();
        let variable = |name: &str, value: f64| path.var(name, &[channels], Init::Const(value));
        let running =
            || (path.zeros_no_train("running_mean", &[channels]), path.ones_no_train("running_var", &[channels]));
        SyncBatchNorm {
            set: set.clone(),
            name: path.components().collect::<Vec<_>>().join("."),
            config,
            channels,
            weight: config.affine.then(|| variable("weight", 1.0)),
            bias: config.affine.then(|| variable("bias", 0.0)),
            running: config.track_running_stats.then(running),
        }
    }

    /// Normalizes `input`: in training by the statistics of all ranks' batches, which also enter the running ones; else by the
    /// running ones, where there are any, without any communication.
    ///
    /// # Errors
    /// If the input does not have the layer's channels, or all ranks' batches together have no more than one value for each.
    pub fn forward(&self, input: &Tensor, train: bool) -> Result<Tensor> {
        let size = input.size();
        if size.len() < 2 || size[1] != self.channels {
            let text =
                format!("`{}`: the input has the shape {size:?}; expected (N, {}, ...)", self.name, self.channels);
            return Err(Error::invalid(text));
        }
        let (mean, variance) = match &self.running {
            Some((mean, variance)) if !train => (mean.shallow_clone(), variance.shallow_clone()),
            _ => self.statistics(input, train)?,
        };
        let kind = wide(input.kind());
        let (mean, variance) = (mean.to_kind(kind), variance.to_kind(kind));
        let scale = (variance + self.config.eps).f_rsqrt()?;
        let scale = self.weight.as_ref().map_or(scale.shallow_clone(), |weight| &scale * weight);
        let shift = self.bias.as_ref().map_or(-&mean * &scale, |bias| bias - &mean * &scale);
        // (C) to (1, C, 1, ...)
        let shape: Vec<_> = (0..size.len()).map(|dim| if dim == 1 { self.channels } else { 1 }).collect();
        let broadcast = |tensor: Tensor| tensor.f_view(&*shape);
        Ok((input.to_kind(kind) * broadcast(scale)? + broadcast(shift)?).to_kind(input.kind()))
    }

    /// Mean and variance, (C) each, over all ranks' batches, in f64.
    fn statistics(&self, input: &Tensor, train: bool) -> Result<(Tensor, Tensor)> {
        let values = input.numel() as f64 / self.channels as f64;
        let (sum, squares) = self.local_sums(input, values)?;
        let count = Tensor::full([1], values, (Kind::Double, input.device()));
        let local = Tensor::f_cat(&[sum, squares, count], 0)?;
        let all = ops::allreduce(&self.set, &local, &format!("{}.statistics", self.name), ReduceOp::Sum)?;
        let (sum, squares) = (all.f_narrow(0, 0, self.channels)?, all.f_narrow(0, self.channels, self.channels)?);
        let count = all.f_narrow(0, 2 * self.channels, 1)?.detach();
        let total = count.double_value(&[0]);
        if total <= 1.0 {
            let text = format!("`{}`: {total} value(s) a channel on all ranks; a variance needs two", self.name);
            return Err(Error::invalid(text));
        }
        let mean = sum / &count;
        let variance = (squares / &count - mean.square()).clamp_min(0.0);
        if train {
            self.remember(&mean, &variance, total)?;
        }
        Ok((mean, variance))
    }

    /// Of this rank's batch, with so many values a channel: the sum and the sum of squares, (C) each, in f64, where squares of
    /// the mean cancel without harm.
    fn local_sums(&self, input: &Tensor, values: f64) -> Result<(Tensor, Tensor)> {
        let dims: Vec<i64> = (0..input.dim() as i64).filter(|&dim| dim != 1).collect();
        let input = input.to_kind(wide(input.kind()));
        if values == 0.0 {
            // Zeros that a gradient can go through: the other ranks wait for this one in the backward pass too.
            let sum = input.f_sum_dim_intlist(&*dims, false, Kind::Double)?;
            return Ok((sum.shallow_clone(), sum));
        }
        let (variance, mean) = input.f_var_mean_dim(&*dims, false, false)?;
        let (variance, mean) = (variance.to_kind(Kind::Double), mean.to_kind(Kind::Double));
        Ok((&mean * values, (variance + mean.square()) * values))
    }

    /// Lets a batch enter the running statistics, its variance without bias.
    fn remember(&self, mean: &Tensor, variance: &Tensor, count: f64) -> Result<()> {
        let Some((running_mean, running_variance)) = &self.running else { return Ok(()) };
        let momentum = self.config.momentum;
        let unbiased = variance * (count / (count - 1.0));
        tch::no_grad(|| {
            for (running, new) in [(running_mean, mean), (running_variance, &unbiased)] {
                let mixed = running * (1.0 - momentum) + new.detach().to_kind(running.kind()) * momentum;
                running.shallow_clone().f_copy_(&mixed)?;
            }
            Ok(())
        })
    }
}

/// What is computed in: f32 at least.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

impl ModuleT for SyncBatchNorm {
    /// As [`SyncBatchNorm::forward`].
    ///
    /// # Panics
    /// Where that gives an error.
    fn forward_t(&self, input: &Tensor, train: bool) -> Tensor {
        match self.forward(input, train) {
            Ok(output) => output,
            Err(error) => panic!("{error}"),
        }
    }
}
