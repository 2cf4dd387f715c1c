//! A weight of the model, and its products with few vectors on the CPU, without tensors in between.
//!
//! Such a product takes as long as it takes to read the weight, which can be read as bf16: half as many bytes.

use std::sync::Mutex;

use bytemuck::cast_slice_mut;
use half::bf16;
use hvd_torch::parallel_for;
use lm_kernels::{Element, multiply};
use tch::{Device, Kind, Tensor};

use super::fused::{Span, is_served};
use crate::{Error, Result};

/// Elements that a thread should have to read.
pub(super) const GRAIN: usize = 1 << 16;

/// A weight (out, in).
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) values: Tensor,
    /// The values rounded to bf16, as products under bf16 autocast see them; none until they are asked for.
    narrow: Option<Vec<bf16>>,
}

impl Matrix {
    pub(super) fn new(values: Tensor) -> Self {
        Self { values, narrow: None }
    }

    /// Elements of a row.
    pub(super) fn inputs(&self) -> usize {
        self.values.size()[1] as usize
    }

    /// Reads the values rounded to bf16 in [`Matrix::product`] from now on.
    ///
    /// # Errors
    /// A weight that is not on the CPU.
    pub(super) fn narrow(&mut self) -> Result<()> {
        if self.values.device() != Device::Cpu {
            return Err(Error::Config(
                "weights in bf16 are for the CPU\nhint: leave out --weights, or use --device cpu".into(),
            ));
        }
        let narrow = self.values.detach().to_kind(Kind::BFloat16).contiguous();
        let mut rows = vec![bf16::ZERO; narrow.numel()];
        narrow.f_copy_data_u8(cast_slice_mut(&mut rows), narrow.numel())?;
        self.narrow = Some(rows);
        Ok(())
    }

    /// Keeps what [`Matrix::product`] reads in large pages, where the system has them.
    pub(super) fn use_large_pages(&self) {
        match &self.narrow {
            Some(rows) => crate::memory::use_large_pages(rows),
            None if is_served(&self.values) => {
                let values = Span::<f32>::of(&self.values);
                // SAFETY: nobody changes weights while the model is borrowed for generation.
                crate::memory::use_large_pages(unsafe { values.all() })
            }
            None => false,
        };
    }

    /// `x·Wᵀ`, (B, in) to (B, out).
    ///
    /// # Panics
    /// Where the values are not f32 on the CPU.
    pub(super) fn product(&self, x: &[f32]) -> Result<Vec<f32>> {
        let whole = Span::<f32>::of(&self.values);
        match &self.narrow {
            Some(rows) => product(rows, self.inputs(), x),
            // SAFETY: nobody changes weights while the model is borrowed for generation.
            None => product(unsafe { whole.all() }, self.inputs(), x),
        }
    }
}

/// As [`Matrix::product`]: each thread takes some of the weight's rows, for all of `x`.
fn product<W: Element>(rows: &[W], inputs: usize, x: &[f32]) -> Result<Vec<f32>> {
    let outputs = rows.len() / inputs;
    let mut products = vec![0.0; x.len() / inputs * outputs];
    let threads = (rows.len() / GRAIN).clamp(1, tch::get_num_threads().max(1) as usize);
    let share = outputs.div_ceil(threads);
    let mut shares: Vec<Vec<&mut [f32]>> = (0..outputs.div_ceil(share)).map(|_| Vec::new()).collect();
    for product in products.chunks_mut(outputs) {
        shares.iter_mut().zip(product.chunks_mut(share)).for_each(|(all, part)| all.push(part));
    }
    let parts = rows.chunks(share * inputs).zip(shares).collect();
    for_each(parts, 1, |(rows, mut products)| multiply(rows, x, inputs, &mut products))?;
    Ok(products)
}

/// Does something with each of `parts`, on torch's threads where there is more than `grain` of them.
pub(super) fn for_each<T: Send>(parts: Vec<T>, grain: usize, body: impl Fn(T) + Sync) -> Result<()> {
    if parts.len() <= grain {
        parts.into_iter().for_each(body);
        return Ok(());
    }
    let parts: Vec<Mutex<Option<T>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    let take = |index: usize| parts[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    Ok(parallel_for(parts.len(), grain, &|range| range.filter_map(take).for_each(&body))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_a_product() {
        tch::set_num_threads(3);
        let (outputs, inputs) = (500, 400);
        let rows: Vec<f32> = (0..outputs * inputs).map(|i| (i as f32).sin()).collect();
        let x: Vec<f32> = (0..2 * inputs).map(|i| (i as f32).cos()).collect();
        assert!(rows.len() / GRAIN >= 3, "enough for three threads");
        let mut alone = vec![0.0; 2 * outputs];
        let (first, second) = alone.split_at_mut(outputs);
        multiply(&rows, &x, inputs, &mut [first, second]);
        assert_eq!(product(&rows, inputs, &x).unwrap(), alone);
    }

    #[test]
    fn each_part_is_served_once_with_any_grain() {
        tch::set_num_threads(3);
        for grain in [1, 4, 100] {
            let mut counts = vec![0; 50];
            for_each(counts.iter_mut().collect(), grain, |count| *count += 1).unwrap();
            assert_eq!(counts, vec![1; 50]);
        }
    }
}
