//! GELU in its tanh form (Hendrycks and Gimpel, 2016), as GPT-2 has it.
//!
//! x · ½(1 + tanh u) is x · σ(2u), where u = √(2/π) · (x + 0.044715 · x³): one exponential, and no tanh.

use super::Element;
use super::exp::exp;
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// 2 · √(2/π)
const TWICE_ROOT: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

/// `x` becomes `gelu(x + bias)`, row by row, where a row is as long as `bias`; and `slopes`, where somebody wants them, the slopes there,
/// which is all that [`gelu_backward`] needs.
///
/// # Panics
/// If the shapes do not fit; so below.
pub fn bias_gelu(x: &mut [f32], bias: &[f32], slopes: Option<&mut [f32]>) {
    assert!(!bias.is_empty() && x.len().is_multiple_of(bias.len()));
    match slopes {
        Some(slopes) => {
            assert_eq!(x.len(), slopes.len());
            dispatch(Forward::<true> { x, bias, slopes });
        }
        None => dispatch(Forward::<false> { x, bias, slopes: &mut [] }),
    }
}

/// `out = grad · slopes`, and each column's sum is added to `sums`.
pub fn gelu_backward<E: Element>(slopes: &[E], grad: &[E], out: &mut [E], sums: &mut [f32]) {
    assert!(!sums.is_empty() && slopes.len() == out.len() && grad.len() == out.len());
    assert!(out.len().is_multiple_of(sums.len()));
    dispatch(Backward { slopes, grad, out, sums });
}

struct Forward<'a, const SLOPES: bool> {
    x: &'a mut [f32],
    bias: &'a [f32],
    /// Empty where they are not wanted.
    slopes: &'a mut [f32],
}

impl<const SLOPES: bool> Kernel for Forward<'_, SLOPES> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let columns = self.bias.len();
        for (at, row) in self.x.chunks_exact_mut(columns).enumerate() {
            let slopes = if SLOPES { &mut self.slopes[at * columns..][..columns] } else { &mut [] };
            for i in 0..columns {
                let value = row[i] + self.bias[i];
                let gate = gate(value);
                row[i] = value * gate;
                if SLOPES {
                    slopes[i] = slope(value, gate);
                }
            }
        }
    }
}

struct Backward<'a, E> {
    slopes: &'a [E],
    grad: &'a [E],
    out: &'a mut [E],
    sums: &'a mut [f32],
}

impl<E: Element> Kernel for Backward<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let columns = self.sums.len();
        let rows = self.slopes.chunks_exact(columns).zip(self.grad.chunks_exact(columns));
        for (out, (slopes, grad)) in self.out.chunks_exact_mut(columns).zip(rows) {
            for (((out, sum), slope), grad) in out.iter_mut().zip(self.sums.iter_mut()).zip(slopes).zip(grad) {
                let value = grad.widen() * slope.widen();
                *out = E::narrow(value);
                *sum += value;
            }
        }
    }
}

/// σ(2u)
#[inline(always)]
pub(super) fn gate(x: f32) -> f32 {
    1.0 / (1.0 + exp(-TWICE_ROOT * x * CUBE.mul_add(x * x, 1.0)))
}

/// GELU's slope at `x`, which has this gate.
#[inline(always)]
pub(super) fn slope(x: f32, gate: f32) -> f32 {
    let inner = (3.0 * TWICE_ROOT * CUBE).mul_add(x * x, TWICE_ROOT); // of 2u
    (x * gate).mul_add((1.0 - gate) * inner, gate)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_levels, numbers};
    use super::*;
    use hvd_kernels::simd::dispatch_at;

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (given, bias, grad) = (numbers(203), numbers(29), vec![0.7; 203]);
        check_levels(|level| {
            let (mut x, mut alone, mut sums) = (given.clone(), given.clone(), bias.clone());
            let [mut slopes, mut grads] = [(); 2].map(|()| vec![0.0; 203]);
            dispatch_at(level, Forward::<true> { x: &mut x, bias: &bias, slopes: &mut slopes });
            dispatch_at(level, Forward::<false> { x: &mut alone, bias: &bias, slopes: &mut [] });
            assert_eq!(x, alone);
            dispatch_at(level, Backward { slopes: &slopes, grad: &grad, out: &mut grads, sums: &mut sums });
            [x, slopes, grads, sums].concat()
        });
    }
}
