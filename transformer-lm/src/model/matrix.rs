//! A weight of the model, and its products with few vectors on the CPU, without tensors in between.
//!
//! Such a product takes as long as it takes to read the weight, which can be kept in fewer bytes for it.

use std::sync::Mutex;

use bytemuck::cast_slice_mut;
use half::bf16;
use hvd_torch::parallel_for;
use lm_kernels::{Quantised, multiply, multiply_quantised, quantise};
use tch::{Device, Kind, Tensor};

use super::fused::{Span, is_served};
use crate::{Error, Result};

/// Elements that a thread should have to read.
pub(super) const GRAIN: usize = 1 << 16;

/// What weights become for the steps of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepWeights {
    /// Rounded to bf16, as products under autocast to bf16 see them.
    Bf16,
    /// Rounded to whole numbers of 8 bits, of which each [`lm_kernels::QUANTUM`] neighbours share a scale.
    Int8,
}

/// A weight (out, in).
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) values: Tensor,
    /// What products read in place of the values.
    narrow: Option<Narrow>,
}

/// A copy of a weight, row by row, in fewer bytes.
#[derive(Debug)]
enum Narrow {
    Bf16(Vec<bf16>),
    Int8 { numbers: Vec<i8>, scales: Vec<f32> },
}

impl Matrix {
    pub(super) fn new(values: Tensor) -> Self {
        Self { values, narrow: None }
    }

    /// Elements of a row.
    pub(super) fn inputs(&self) -> usize {
        self.values.size()[1] as usize
    }

    /// Reads a rounded copy of the values in [`Matrix::product`] from now on.
    ///
    /// # Errors
    /// A weight that is not on the CPU.
    pub(super) fn narrow(&mut self, weights: StepWeights) -> Result<()> {
        if self.values.device() != Device::Cpu {
            return Err(Error::Config(
                "rounded weights are for the CPU\nhint: leave out --weights, or use --device cpu".into(),
            ));
        }
        self.narrow = Some(match weights {
            StepWeights::Bf16 => {
                let rounded = self.values.detach().to_kind(Kind::BFloat16).contiguous();
                let mut rows = vec![bf16::ZERO; rounded.numel()];
                rounded.f_copy_data_u8(cast_slice_mut(&mut rows), rounded.numel())?;
                Narrow::Bf16(rows)
            }
            StepWeights::Int8 => {
                let whole = self.values.detach().to_kind(Kind::Float).contiguous();
                let values = Span::<f32>::of(&whole);
                // SAFETY: nobody changes weights while the model is borrowed for this.
                let (numbers, scales) = quantise(unsafe { values.all() }, self.inputs());
                Narrow::Int8 { numbers, scales }
            }
        });
        Ok(())
    }

    /// Keeps what [`Matrix::product`] reads in large pages, where the system has them.
    pub(super) fn use_large_pages(&self) {
        match &self.narrow {
            Some(Narrow::Bf16(rows)) => crate::memory::use_large_pages(rows),
            Some(Narrow::Int8 { numbers, scales }) => {
                crate::memory::use_large_pages(numbers) | crate::memory::use_large_pages(scales)
            }
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
        let (whole, inputs) = (Span::<f32>::of(&self.values), self.inputs());
        let rows = |share: usize| share * inputs;
        match &self.narrow {
            Some(Narrow::Bf16(all)) => {
                self.share(x, |share| all.chunks(rows(share)), |part, products| multiply(part, x, inputs, products))
            }
            Some(Narrow::Int8 { numbers, scales }) => {
                let all = Quantised::new(numbers, scales, inputs);
                self.share(x, |share| all.chunks(share), |part, products| multiply_quantised(part, x, products))
            }
            None => {
                // SAFETY: nobody changes weights while the model is borrowed for generation.
                let all = unsafe { whole.all() };
                self.share(x, |share| all.chunks(rows(share)), |part, products| multiply(part, x, inputs, products))
            }
        }
    }

    /// The products of all of `x`: each thread takes one of the parts of so many rows that `cut` gives, and has `multiply` write its
    /// part of each product.
    fn share<P: Send, I: Iterator<Item = P>>(
        &self,
        x: &[f32],
        cut: impl FnOnce(usize) -> I,
        multiply: impl Fn(P, &mut [&mut [f32]]) + Sync,
    ) -> Result<Vec<f32>> {
        let inputs = self.inputs();
        let outputs = self.values.size()[0] as usize;
        let mut products = vec![0.0; x.len() / inputs * outputs];
        let threads = (outputs * inputs / GRAIN).clamp(1, tch::get_num_threads().max(1) as usize);
        let share = outputs.div_ceil(threads);
        let mut shares: Vec<Vec<&mut [f32]>> = (0..outputs.div_ceil(share)).map(|_| Vec::new()).collect();
        for product in products.chunks_mut(outputs) {
            shares.iter_mut().zip(product.chunks_mut(share)).for_each(|(all, part)| all.push(part));
        }
        let parts = cut(share).zip(shares).collect();
        for_each(parts, 1, |(part, mut products)| multiply(part, &mut products))?;
        Ok(products)
    }
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
        let (outputs, inputs) = (500, 400);
        let rows: Vec<f32> = (0..outputs * inputs).map(|i| (i as f32).sin()).collect();
        let x: Vec<f32> = (0..2 * inputs).map(|i| (i as f32).cos()).collect();
        assert!(rows.len() / GRAIN >= 3, "enough for three threads");
        let mut matrix = Matrix::new(Tensor::from_slice(&rows).view([outputs, inputs]));
        let mut check = |weights: Option<StepWeights>| {
            weights.map_or(Ok(()), |weights| matrix.narrow(weights)).unwrap();
            let [alone, shared] = [1, 3].map(|threads| {
                tch::set_num_threads(threads);
                matrix.product(&x).unwrap()
            });
            assert_eq!(alone, shared, "{weights:?}");
            shared
        };
        let whole = check(None);
        let mut expected = vec![0.0; 2 * outputs as usize];
        let (first, second) = expected.split_at_mut(outputs as usize);
        multiply(&rows, &x, inputs as usize, &mut [first, second]);
        assert_eq!(whole, expected);
        let difference = |found: Vec<f32>| {
            let [off, size] = [0, 1].map(|at| {
                found.iter().zip(&whole).map(|(a, b)| (if at == 0 { a - b } else { *b }).powi(2)).sum::<f32>().sqrt()
            });
            off / size
        };
        let [bf16, int8] = [StepWeights::Bf16, StepWeights::Int8].map(|weights| difference(check(Some(weights))));
        assert!((1e-5..1e-2).contains(&bf16) && (1e-5..1e-2).contains(&int8), "{bf16} {int8}");
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
