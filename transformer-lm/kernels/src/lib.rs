//! The loops of a language model that libtorch's libraries are not the quickest for, in f32: GELU, causal softmax, normalisation,
//! cross-entropy, dropout, and products with few vectors.
//!
//! They do the same operations in the same order on every processor, whatever the width of its vectors. A package of its own so
//! that a debug build can optimise them.
#![deny(missing_docs)]

mod activation;
mod attention;
mod dropout;
mod exp;
mod loss;
mod norm;
mod product;

pub use activation::{bias_gelu, gelu_backward};
pub use attention::{causal_softmax, causal_softmax_backward, causal_weights, drop_weights};
pub use dropout::{Mask, mask_factors};
pub use loss::{Loss, Target, cross_entropy};
pub use norm::{ColumnSums, Moments, Norm, Normalised, add_rows, add_scaled, normalise, normalise_backward};
pub use product::{Weight, multiply, weighted_sum};

/// Partial results of a row that are kept side by side, so that a loop over it can use vectors.
const LANES: usize = 16;

/// Folds `f` of each value into [`LANES`] partial results, and these into one. `f` and `fold` must be inlined.
#[inline(always)]
fn fold(row: &[f32], start: f32, f: impl Fn(f32) -> f32 + Copy, fold: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let mut lanes = [start; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = fold(lanes[lane], f(chunk[lane]));
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = fold(*lane, f(*value));
    }
    lanes.into_iter().fold(start, fold)
}

/// The greatest value of a row; NaN may be passed over.
#[inline(always)]
fn greatest(row: &[f32]) -> f32 {
    fold(row, f32::NEG_INFINITY, |value| value, |a, b| if b > a { b } else { a })
}

#[cfg(test)]
mod tests {
    use hvd_kernels::simd::Level;

    /// Some numbers that are neither equal nor in order.
    pub(super) fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919) % 1009) as f32 / 100.0 - 5.0).collect()
    }

    /// Refuses a kernel whose results depend on the instruction set.
    pub(super) fn check_levels(run: impl Fn(Level) -> Vec<f32>) {
        let bits = |level| run(level).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let expected = bits(Level::Baseline);
        assert!(Level::available().all(|level| bits(level) == expected));
    }
}
