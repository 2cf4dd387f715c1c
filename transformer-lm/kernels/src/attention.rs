//! The softmax of causal attention, over blocks of scores.
//!
//! A block has some queries' rows of `columns` scores, a column for each key. Row `r` sees the keys `0..=first + r`; what it does not
//! see has a weight of zero, whatever the score. Dropout takes some of the weights for zero, and multiplies the others by a factor, after
//! the softmax; its mask begins with the block's first row.

use super::exp::exp;
use super::{Mask, fold, greatest};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// Scores to weights, in place, and the logarithm of each row's sum of exponentials to `log_sums`.
///
/// # Panics
/// If the block has no row for each of `log_sums`, or a row sees more than its columns; so below.
pub fn causal_softmax(block: &mut [f32], columns: usize, first: usize, log_sums: &mut [f32]) {
    check(block, columns, first, log_sums.len());
    dispatch(Softmax { block, columns, first, log_sums });
}

/// Weights to what dropout leaves of them, in place.
///
/// # Panics
/// If the block is not whole rows, or a row sees more than its columns.
pub fn drop_weights(block: &mut [f32], columns: usize, first: usize, mask: Mask) {
    check(block, columns, first, block.len() / columns.max(1));
    dispatch(Drop { block, columns, first, mask });
}

/// Scores to weights before dropout, in place, from the sums that [`causal_softmax`] gave.
///
/// # Panics
/// As [`causal_softmax`].
pub fn causal_weights(block: &mut [f32], columns: usize, first: usize, log_sums: &[f32]) {
    check(block, columns, first, log_sums.len());
    dispatch(Weights { block, columns, first, log_sums });
}

/// Gradients of the weights to those of the scores before their scaling by `scale`, in place. `dots` are each row's product of
/// weights and gradients. The weights come without dropout, and become what dropout leaves of them.
///
/// # Panics
/// As [`causal_softmax`], and if there are not as many weights as gradients.
pub fn causal_softmax_backward(
    weights: &mut [f32],
    grads: &mut [f32],
    columns: usize,
    first: usize,
    dots: &[f32],
    scale: f32,
    mask: Option<Mask>,
) {
    assert_eq!(weights.len(), grads.len());
    check(grads, columns, first, dots.len());
    match mask {
        None => dispatch(Backward { weights, grads, columns, dots, scale }),
        Some(mask) => dispatch(DropBackward { weights, grads, columns, first, dots, scale, mask }),
    }
}

fn check(block: &[f32], columns: usize, first: usize, rows: usize) {
    assert!(columns > 0 && block.len() == rows * columns && first + rows <= columns);
}

struct Softmax<'a> {
    block: &'a mut [f32],
    columns: usize,
    first: usize,
    log_sums: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (r, (row, log_sum)) in self.block.chunks_exact_mut(self.columns).zip(self.log_sums).enumerate() {
            let (seen, hidden) = row.split_at_mut(self.first + r + 1);
            let highest = greatest(seen);
            for score in seen.iter_mut() {
                *score = exp(*score - highest);
            }
            let sum = fold(seen, 0.0, |value| value, |a, b| a + b);
            let share = 1.0 / sum;
            for weight in seen.iter_mut() {
                *weight *= share;
            }
            hidden.fill(0.0);
            *log_sum = highest + sum.ln();
        }
    }
}

struct Weights<'a> {
    block: &'a mut [f32],
    columns: usize,
    first: usize,
    log_sums: &'a [f32],
}

impl Kernel for Weights<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (r, (row, &log_sum)) in self.block.chunks_exact_mut(self.columns).zip(self.log_sums).enumerate() {
            let (seen, hidden) = row.split_at_mut(self.first + r + 1);
            for score in seen.iter_mut() {
                *score = exp(*score - log_sum);
            }
            hidden.fill(0.0);
        }
    }
}

struct Backward<'a> {
    weights: &'a [f32],
    grads: &'a mut [f32],
    columns: usize,
    dots: &'a [f32],
    scale: f32,
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let rows = self.grads.chunks_exact_mut(self.columns).zip(self.weights.chunks_exact(self.columns));
        for ((grads, weights), &dot) in rows.zip(self.dots) {
            for (grad, &weight) in grads.iter_mut().zip(weights) {
                *grad = weight * (*grad - dot) * self.scale;
            }
        }
    }
}

/// Weights to what dropout leaves of them.
struct Drop<'a> {
    block: &'a mut [f32],
    columns: usize,
    first: usize,
    mask: Mask,
}

impl Kernel for Drop<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut factors = vec![0.0; self.columns];
        for (r, row) in self.block.chunks_exact_mut(self.columns).enumerate() {
            let seen = self.first + r + 1;
            self.mask.factors_of(r, &mut factors[..seen]);
            for (weight, factor) in row[..seen].iter_mut().zip(&factors) {
                *weight *= factor;
            }
        }
    }
}

/// [`Backward`] with dropout between the weights and their gradients, and [`Drop`].
struct DropBackward<'a> {
    weights: &'a mut [f32],
    grads: &'a mut [f32],
    columns: usize,
    first: usize,
    dots: &'a [f32],
    scale: f32,
    mask: Mask,
}

impl Kernel for DropBackward<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut factors = vec![0.0; self.columns];
        let rows = self.grads.chunks_exact_mut(self.columns).zip(self.weights.chunks_exact_mut(self.columns));
        for (r, ((grads, weights), &dot)) in rows.zip(self.dots).enumerate() {
            self.mask.factors_of(r, &mut factors[..self.first + r + 1]);
            for ((grad, weight), factor) in grads.iter_mut().zip(weights).zip(&factors) {
                *grad = *weight * (*grad * factor - dot) * self.scale;
                *weight *= factor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_levels, numbers};
    use super::*;
    use hvd_kernels::simd::dispatch_at;

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (columns, first) = (203, 198);
        check_levels(|level| {
            let (mut block, mut log_sums) = (numbers(5 * columns), vec![0.0; 5]);
            dispatch_at(level, Softmax { block: &mut block, columns, first, log_sums: &mut log_sums });
            let mut again = numbers(5 * columns);
            dispatch_at(level, Weights { block: &mut again, columns, first, log_sums: &log_sums });
            let mut grads = numbers(5 * columns);
            dispatch_at(level, Backward { weights: &block, grads: &mut grads, columns, dots: &log_sums, scale: 0.3 });
            let (mask, mut dropped, mut weights, mut others) =
                (Mask::new(9, 0.2), block.clone(), block.clone(), numbers(5 * columns));
            dispatch_at(level, Drop { block: &mut dropped, columns, first, mask });
            let (dots, scale) = (&log_sums[..], 0.3);
            let (weights_of, grads_of) = (&mut weights[..], &mut others[..]);
            dispatch_at(
                level,
                DropBackward { weights: weights_of, grads: grads_of, columns, first, dots, scale, mask },
            );
            assert_eq!(weights, dropped);
            [block, again, grads, dropped, others, log_sums].concat()
        });
    }
}
