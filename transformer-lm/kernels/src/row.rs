//! What the steps of a generation do with single rows, beside products.

use super::norm::{AddScaled, Moments, Norm, add_columns, normalise};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// `to += values`.
///
/// # Panics
/// If the lengths differ; so below.
pub fn add(to: &mut [f32], values: &[f32]) {
    assert_eq!(to.len(), values.len());
    add_columns(values, to);
}

/// `out = (x − mean) / √(variance + eps) · weight + bias`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    normalise(x, Norm { weight, bias, eps }, out, &mut [Moments::default()]);
}

/// `out = Σᵢ weights[i] · rows[i]`, where a row is as long as `out`.
pub fn weighted_sum(rows: &[f32], weights: &[f32], out: &mut [f32]) {
    assert!(!out.is_empty() && rows.len() == weights.len() * out.len());
    dispatch(WeightedSum { rows, weights, out });
}

struct WeightedSum<'a> {
    rows: &'a [f32],
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for WeightedSum<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        self.out.fill(0.0);
        for (row, weight) in self.rows.chunks_exact(self.out.len()).zip(self.weights) {
            AddScaled { values: row, factor: *weight, sum: self.out }.run::<I>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_levels, numbers};
    use super::*;
    use hvd_kernels::simd::dispatch_at;

    #[test]
    fn a_normal_row_has_no_mean_and_a_variance_of_one() {
        let x = numbers(37);
        let mut out = vec![0.0; 37];
        layer_norm(&x, &[1.0; 37], &[0.0; 37], 0.0, &mut out);
        let mean = |values: &[f32]| values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len() as f64;
        let squares: Vec<f32> = out.iter().map(|value| value * value).collect();
        assert!(mean(&out).abs() < 1e-6 && (mean(&squares) - 1.0).abs() < 1e-6);
        let mut moved = vec![0.0; 37];
        layer_norm(&x, &[3.0; 37], &[0.5; 37], 0.0, &mut moved);
        assert!(out.iter().zip(&moved).all(|(out, moved)| (out * 3.0 + 0.5 - moved).abs() < 1e-5));
    }

    #[test]
    fn rows_are_weighted() {
        let mut out = [9.0; 3];
        weighted_sum(&[1.0, 2.0, 3.0, 10.0, 20.0, 30.0], &[2.0, 0.5], &mut out);
        assert_eq!(out, [7.0, 14.0, 21.0]);
        add(&mut out, &[1.0, 0.0, -1.0]);
        assert_eq!(out, [8.0, 14.0, 20.0]);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (rows, x) = (numbers(5 * 203), numbers(203));
        check_levels(|level| {
            let mut sum = vec![0.0; 203];
            dispatch_at(level, WeightedSum { rows: &rows, weights: &x[..5], out: &mut sum });
            sum
        });
    }
}
