//! Dropout (Srivastava et al., 2014), whose masks follow from a key of each sequence and the place in the model.
//!
//! So a sequence has the same masks on any rank and in any micro-batch, and when a part of the model is computed again; and nobody keeps
//! them for the backward pass.

use hvd_torch::autograd::{differentiate, wanted};
use hvd_torch::{mix, parallel_for, reseed};
use lm_kernels::{Mask, mask_factors};
use tch::{Device, Kind, Tensor};

use super::fused::Span;
use crate::{Error, Result};

/// Elements of a mask that are worth a thread.
const GRAIN: usize = 1 << 13;

/// What dropout does to some sequences: in a model, and then in each of its parts ([`Dropout::at`]).
///
/// On other devices than the CPU torch makes the masks. There they follow from the keys of all sequences that are computed at once.
#[derive(Clone, Debug)]
pub struct Dropout {
    probability: f64,
    /// One for each sequence.
    keys: Vec<u64>,
}

impl Dropout {
    /// Drops nothing.
    pub fn none() -> Dropout {
        Dropout { probability: 0.0, keys: Vec::new() }
    }

    /// Drops each element with this probability, in `[0, 1)`. The masks of a sequence follow from its key: different keys have independent
    /// ones, and nobody asks for them where nothing is dropped.
    pub fn new(probability: f64, keys: impl IntoIterator<Item = u64>) -> Dropout {
        match probability > 0.0 {
            true => Dropout { probability, keys: keys.into_iter().collect() },
            false => Dropout::none(),
        }
    }

    /// For so many sequences, with keys from torch's generator.
    pub(super) fn drawn(probability: f64, sequences: i64) -> Result<Dropout> {
        let keys = Tensor::randint(i64::MAX, [sequences], (Kind::Int64, Device::Cpu));
        Ok(Dropout::new(probability, Vec::<i64>::try_from(keys)?.into_iter().map(|key| key as u64)))
    }

    /// The same sequences' dropout in a part of the model, or of a part; each part has masks of its own.
    pub fn at(&self, part: u64) -> Dropout {
        Dropout { probability: self.probability, keys: self.keys.iter().map(|key| mix(&[*key, part])).collect() }
    }

    /// Whether nothing is dropped.
    pub fn is_off(&self) -> bool {
        self.probability == 0.0
    }

    /// The masks of so many sequences; none where nothing is dropped.
    pub(super) fn masks_of(&self, sequences: usize) -> Result<Option<Vec<Mask>>> {
        if self.is_off() {
            return Ok(None);
        }
        if sequences != self.keys.len() {
            return Err(Error::Config(format!("dropout of {} sequences for {sequences}", self.keys.len())));
        }
        Ok(Some(self.keys.iter().map(|key| Mask::new(*key, self.probability)).collect()))
    }

    /// For functions of torch's that make the masks themselves: the probability, after the generator was set by the keys.
    pub(super) fn of_torch(&self) -> f64 {
        if !self.is_off() {
            reseed(&self.keys);
        }
        self.probability
    }

    /// What is left of `x`, whose first dimension is that of the sequences.
    ///
    /// # Errors
    /// Another number of sequences; if torch fails.
    pub fn apply(&self, x: Tensor) -> Result<Tensor> {
        if x.device() != Device::Cpu {
            return if self.is_off() { Ok(x) } else { Ok(x.f_dropout(self.of_torch(), true)?) };
        }
        let sequences = if x.dim() > 1 && x.numel() > 0 { x.size()[0] as usize } else { 0 };
        let Some(masks) = self.masks_of(sequences)? else { return Ok(x) };
        let out = [multiply(&x.detach(), &masks)?];
        if wanted([&x]) {
            differentiate(&[&x], &out, move |grads| Ok(vec![multiply(&grads[0], &masks)?]))?;
        }
        let [out] = out;
        Ok(out)
    }
}

fn multiply(x: &Tensor, masks: &[Mask]) -> hvd_torch::Result<Tensor> {
    Ok(x.f_mul(&factors(&x.size(), masks)?)?.f_to_kind(x.kind())?)
}

/// What elements of this shape are multiplied by, in f32; the first dimension is that of the sequences, the last one's are a row.
fn factors(shape: &[i64], masks: &[Mask]) -> hvd_torch::Result<Tensor> {
    let factors = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
    let columns = shape[shape.len() - 1] as usize;
    let rows = factors.numel() / columns / masks.len();
    let span = Span::of(&factors);
    parallel_for(rows * masks.len(), GRAIN.div_ceil(columns), &|range| {
        for row in range {
            let mask = masks[row / rows].from_row(row % rows);
            // SAFETY: each row belongs to one thread.
            mask_factors(mask, columns, unsafe { span.write(row * columns..(row + 1) * columns) });
        }
    })?;
    Ok(factors)
}
