//! GELU in its tanh form (Hendrycks and Gimpel, 2016), as GPT-2 has it.
//!
//! x · ½(1 + tanh u) is x · σ(2u), where u = √(2/π) · (x + 0.044715 · x³): one exponential, and no tanh.

use super::exp::exp;
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// 2 · √(2/π)
const TWICE_ROOT: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

/// `out = gelu(x)`.
///
/// # Panics
/// If the shapes do not fit; so below.
pub fn gelu(x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    dispatch(Plain { x, out });
}

/// `out = gelu(x + bias)`, row by row, where a row is as long as `bias`; `x` becomes the slopes there, which is all that
/// [`gelu_backward`] needs.
pub fn bias_gelu(x: &mut [f32], bias: &[f32], out: &mut [f32]) {
    assert!(!bias.is_empty() && x.len() == out.len() && x.len().is_multiple_of(bias.len()));
    dispatch(Forward { x, bias, out });
}

/// `out = grad · slopes`, and each column's sum is added to `sums`.
pub fn gelu_backward(slopes: &[f32], grad: &[f32], out: &mut [f32], sums: &mut [f32]) {
    assert!(!sums.is_empty() && slopes.len() == out.len() && grad.len() == out.len());
    assert!(out.len().is_multiple_of(sums.len()));
    dispatch(Backward { slopes, grad, out, sums });
}

struct Plain<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Plain<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (out, &x) in self.out.iter_mut().zip(self.x) {
            *out = x * gate(x);
        }
    }
}

struct Forward<'a> {
    x: &'a mut [f32],
    bias: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let columns = self.bias.len();
        for (row, out) in self.x.chunks_exact_mut(columns).zip(self.out.chunks_exact_mut(columns)) {
            for ((x, bias), out) in row.iter_mut().zip(self.bias).zip(out) {
                let value = *x + bias;
                let gate = gate(value);
                let slope = TWICE_ROOT * (1.0 + 3.0 * CUBE * (value * value)); // of 2u
                *out = value * gate;
                *x = gate + value * (gate * (1.0 - gate)) * slope;
            }
        }
    }
}

struct Backward<'a> {
    slopes: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let columns = self.sums.len();
        let rows = self.slopes.chunks_exact(columns).zip(self.grad.chunks_exact(columns));
        for (out, (slopes, grad)) in self.out.chunks_exact_mut(columns).zip(rows) {
            for (((out, sum), slope), grad) in out.iter_mut().zip(self.sums.iter_mut()).zip(slopes).zip(grad) {
                *out = grad * slope;
                *sum += *out;
            }
        }
    }
}

/// σ(2u)
#[inline(always)]
fn gate(x: f32) -> f32 {
    1.0 / (1.0 + exp(-TWICE_ROOT * (x + CUBE * (x * x * x))))
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
            let (mut x, mut values, mut grads, mut sums) =
                (given.clone(), vec![0.0; 203], vec![0.0; 203], bias.clone());
            dispatch_at(level, Forward { x: &mut x, bias: &bias, out: &mut values });
            dispatch_at(level, Backward { slopes: &x, grad: &grad, out: &mut grads, sums: &mut sums });
            let mut plain = vec![0.0; 203];
            dispatch_at(level, Plain { x: &given, out: &mut plain });
            [x, values, grads, sums, plain].concat()
        });
    }
}
