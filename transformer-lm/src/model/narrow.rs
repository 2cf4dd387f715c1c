//! Weights in 16 bits for the steps of a generation, in which each weight is read once and used for a token or a few.

use bytemuck::cast_slice_mut;
use half::bf16;
use lm_kernels::multiply;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// For more sequences at once the product with whole weights is faster.
const MOST_ROWS: i64 = 4;

/// A dense weight (out, in) rounded to bfloat16, as products under bf16 autocast see it; products and sums are f32.
#[derive(Debug)]
pub(super) struct NarrowWeight {
    rows: Vec<bf16>,
    inputs: usize,
}

impl NarrowWeight {
    /// # Errors
    /// A weight that is not on the CPU.
    pub(super) fn of(weight: &Tensor) -> Result<Self> {
        if weight.device() != Device::Cpu {
            return Err(Error::Config(
                "weights in bf16 are for the CPU\nhint: leave out --weights, or use --device cpu".into(),
            ));
        }
        let narrow = weight.detach().to_kind(Kind::BFloat16).contiguous();
        let mut rows = vec![bf16::ZERO; narrow.numel()];
        narrow.f_copy_data_u8(cast_slice_mut(&mut rows), narrow.numel())?;
        Ok(Self { rows, inputs: weight.size()[1] as usize })
    }

    /// `x·Wᵀ` for a step of a generation, (B, 1, in) to (B, 1, out); none where `x` is something else.
    pub(super) fn product(&self, x: &Tensor) -> Option<Tensor> {
        let rows = match x.size()[..] {
            [rows, 1, _] if rows <= MOST_ROWS && x.kind() == Kind::Float && !x.requires_grad() => rows,
            _ => return None,
        };
        let vectors = Vec::<f32>::try_from(x.contiguous().view([-1])).ok()?;
        let outputs = self.rows.len() / self.inputs;
        let mut products = vec![0f32; rows as usize * outputs];
        // Each thread takes some of the weight's rows, for all vectors.
        let share = outputs.div_ceil(tch::get_num_threads().max(1) as usize).max(1);
        let mut shares: Vec<Vec<&mut [f32]>> = (0..outputs.div_ceil(share)).map(|_| Vec::new()).collect();
        for product in products.chunks_mut(outputs) {
            shares.iter_mut().zip(product.chunks_mut(share)).for_each(|(all, part)| all.push(part));
        }
        let weights = self.rows.par_chunks(share * self.inputs);
        weights.zip(shares).for_each(|(weights, mut products)| multiply(weights, &vectors, self.inputs, &mut products));
        Some(Tensor::from_slice(&products).view([rows, 1, outputs as i64]))
    }
}
