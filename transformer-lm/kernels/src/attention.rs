//! The softmax of causal attention, over blocks of scores.
//!
//! A block has some queries' rows of `columns` scores, a column for each key. Row `r` sees the keys `0..=first + r`; what it does not
//! see has a weight of zero, whatever the score. Dropout takes some of the weights for zero, and multiplies the others by a factor, after
//! the softmax; its mask begins with the block's first row.

use super::exp::exp;
use super::{Element, LANES, Mask, View, greatest, total};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// Scores times `scale` to weights, in place, and the logarithm of each row's sum of exponentials to `log_sums`.
///
/// # Panics
/// If the block has no row for each of `log_sums`, or a row sees more than its columns; so below.
pub fn causal_softmax(block: &mut [f32], columns: usize, first: usize, scale: f32, log_sums: &mut [f32]) {
    check(block, columns, first, log_sums.len());
    dispatch(Softmax { block, columns, first, scale, log_sums });
}

/// Weights to what dropout leaves of them, in place.
///
/// # Panics
/// If the block is not whole rows, or a row sees more than its columns.
pub fn drop_weights(block: &mut [f32], columns: usize, first: usize, mask: Mask) {
    check(block, columns, first, block.len() / columns.max(1));
    dispatch(Drop { block, columns, first, mask });
}

/// Scores times `scale` to weights before dropout, in place, from the sums that [`causal_softmax`] gave.
///
/// # Panics
/// As [`causal_softmax`].
pub fn causal_weights(block: &mut [f32], columns: usize, first: usize, scale: f32, log_sums: &[f32]) {
    check(block, columns, first, log_sums.len());
    dispatch(Weights { block, columns, first, scale, log_sums });
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

/// The product of each row of `a` with that of `b`.
///
/// # Panics
/// If they have not a row for each of `dots`, or not as many columns.
pub fn row_dots<E: Element>(a: View<E>, b: View<E>, dots: &mut [f32]) {
    assert!(a.shape() == b.shape() && a.shape()[0] == dots.len());
    dispatch(Dots { a, b, dots });
}

fn check(block: &[f32], columns: usize, first: usize, rows: usize) {
    assert!(columns > 0 && block.len() == rows * columns && first + rows <= columns);
}

struct Dots<'a, E> {
    a: View<'a, E>,
    b: View<'a, E>,
    dots: &'a mut [f32],
}

impl<E: Element> Kernel for Dots<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (at, dot) in self.dots.iter_mut().enumerate() {
            let [a, b] = [self.a, self.b].map(|rows| rows.row(at).as_chunks::<LANES>());
            let mut lanes = [0.0f32; LANES];
            for (a, b) in a.0.iter().zip(b.0) {
                for lane in 0..LANES {
                    lanes[lane] = a[lane].widen().mul_add(b[lane].widen(), lanes[lane]);
                }
            }
            *dot = a.1.iter().zip(b.1).fold(total(lanes), |dot, (a, b)| a.widen().mul_add(b.widen(), dot));
        }
    }
}

struct Softmax<'a> {
    block: &'a mut [f32],
    columns: usize,
    first: usize,
    scale: f32,
    log_sums: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (r, (row, log_sum)) in self.block.chunks_exact_mut(self.columns).zip(self.log_sums).enumerate() {
            let seen = self.first + r + 1;
            // What is hidden counts for nothing, and is computed as far as it fills the last of the lanes.
            let end = self.columns.min(seen.next_multiple_of(LANES));
            row[seen..end].fill(f32::NEG_INFINITY);
            let highest = greatest(&row[..end]) * self.scale;
            let sum = exponentials(&mut row[..end], self.scale, highest);
            row[seen..].fill(0.0);
            let share = 1.0 / sum;
            for weight in &mut row[..end] {
                *weight *= share;
            }
            *log_sum = highest + sum.ln();
        }
    }
}

/// Takes the exponential of each score times `scale`, less `shift`; their sum.
#[inline(always)]
fn exponentials(row: &mut [f32], scale: f32, shift: f32) -> f32 {
    let exponential = |score: f32| exp(score.mul_add(scale, -shift));
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exponential(chunk[lane]);
            lanes[lane] += chunk[lane];
        }
    }
    rest.iter_mut().fold(total(lanes), |sum, score| {
        *score = exponential(*score);
        sum + *score
    })
}

struct Weights<'a> {
    block: &'a mut [f32],
    columns: usize,
    first: usize,
    scale: f32,
    log_sums: &'a [f32],
}

impl Kernel for Weights<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (r, (row, &log_sum)) in self.block.chunks_exact_mut(self.columns).zip(self.log_sums).enumerate() {
            let seen = self.first + r + 1;
            for score in &mut row[..self.columns.min(seen.next_multiple_of(LANES))] {
                *score = exp(score.mul_add(self.scale, -log_sum));
            }
            row[seen..].fill(0.0);
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
    fn rows_are_multiplied_each_with_its_own() {
        let mut dots = [0.0; 2];
        let [a, b] = [[1.0, 2.0, 9.0, 3.0, 4.0, 9.0], [5.0, 6.0, 9.0, 7.0, 8.0, 9.0]];
        row_dots(View::of(&a, 3).columns(0..2), View::of(&b, 3).columns(0..2), &mut dots);
        assert_eq!(dots, [17.0, 53.0]);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (columns, first) = (203, 198);
        check_levels(|level| {
            let (mut block, mut log_sums) = (numbers(5 * columns), vec![0.0; 5]);
            dispatch_at(level, Softmax { block: &mut block, columns, first, scale: 0.3, log_sums: &mut log_sums });
            let mut again = numbers(5 * columns);
            dispatch_at(level, Weights { block: &mut again, columns, first, scale: 0.3, log_sums: &log_sums });
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
            let mut dots = vec![0.0; 4];
            let [a, b] = [&block, &others].map(|block| View::of(&block[..4 * 101], 101).columns(0..53));
            dispatch_at(level, Dots { a, b, dots: &mut dots });
            [block, again, grads, dropped, others, log_sums, dots].concat()
        });
    }
}
