//! The loops of a language model that libtorch's libraries are not the quickest for, in f32: GELU, causal softmax, normalisation,
//! cross-entropy, dropout, and products with few vectors; and products of bf16, with what comes before and after them.
//!
//! Those of f32 do the same operations in the same order on every processor, whatever the width of its vectors. Where a processor has
//! instructions for bf16, these sum in an order of their own, and take subnormal numbers for zero. A package of its own so that a debug
//! build can optimise them.
#![deny(missing_docs)]

mod activation;
mod attention;
mod blocks;
mod dropout;
mod element;
mod exp;
mod fetch;
mod finish;
mod lines;
mod loss;
mod norm;
mod panel;
mod product;
mod quantised;
mod window;

pub use activation::{bias_gelu, gelu_backward};
pub use attention::{causal_softmax, causal_softmax_backward, causal_weights, drop_weights, row_dots};
pub use blocks::{Multiplier, Unit};
pub use dropout::{Mask, mask_factors};
pub use element::{Element, convert};
pub use finish::{accumulate, add_to, gelu, multiply_by, scale, store};
pub use lines::Lines;
pub use loss::{Loss, Target, cross_entropy};
pub use norm::{ColumnSums, Moments, Norm, Normalised, add_rows, add_scaled, normalise, normalise_backward};
pub use panel::{PANEL, Pair, PanelRow, pack_columns, pack_rows, transpose};
pub use product::{multiply, multiply_quantised, weighted_sum};
pub use quantised::{QUANTUM, Quantised, quantise};
pub use window::{View, Window, finish_streams};

/// Partial results of a row that are kept side by side, so that a loop over it can use vectors, and two of them at once.
const LANES: usize = 32;

/// Folds `f` of each value into [`LANES`] partial results, and these into one. `f` and `fold` must be inlined.
#[inline(always)]
fn fold<E: Element>(
    row: &[E],
    start: f32,
    f: impl Fn(f32) -> f32 + Copy,
    fold: impl Fn(f32, f32) -> f32 + Copy,
) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [start; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = fold(lanes[lane], f(chunk[lane].widen()));
        }
    }
    let whole = merge(lanes, fold);
    rest.iter().fold(whole, |result, value| fold(result, f(value.widen())))
}

/// The sum of partial results.
#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    merge(lanes, |a, b| a + b)
}

/// Folds the second half into the first until there is one left: one after the other would take longer than a short row.
#[inline(always)]
fn merge(lanes: [f32; LANES], fold: impl Fn(f32, f32) -> f32) -> f32 {
    // Did the compiler see both, it would shape the loop that fills the lanes for what follows here, in vectors of two.
    let mut lanes = std::hint::black_box(lanes);
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = fold(lanes[lane], lanes[half + lane]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The greatest value of a row; NaN may be passed over.
#[inline(always)]
fn greatest<E: Element>(row: &[E]) -> f32 {
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
