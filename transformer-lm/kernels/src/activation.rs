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
/// If the lengths differ.
pub fn gelu(x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    dispatch(Forward { x, out });
}

/// `out = grad · gelu'(x)`.
///
/// # Panics
/// If the lengths differ.
pub fn gelu_backward(x: &[f32], grad: &[f32], out: &mut [f32]) {
    assert!(x.len() == out.len() && grad.len() == out.len());
    dispatch(Backward { x, grad, out });
}

struct Forward<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (out, &x) in self.out.iter_mut().zip(self.x) {
            *out = x * gate(x);
        }
    }
}

struct Backward<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for ((out, &x), &grad) in self.out.iter_mut().zip(self.x).zip(self.grad) {
            let gate = gate(x);
            let slope = TWICE_ROOT * (1.0 + 3.0 * CUBE * (x * x)); // of 2u
            *out = grad * (gate + x * (gate * (1.0 - gate)) * slope);
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
        let (x, grad) = (numbers(203), vec![0.7; 203]);
        check_levels(|level| {
            let (mut values, mut slopes) = (vec![0.0; 203], vec![0.0; 203]);
            dispatch_at(level, Forward { x: &x, out: &mut values });
            dispatch_at(level, Backward { x: &x, grad: &grad, out: &mut slopes });
            [values, slopes].concat()
        });
    }
}
