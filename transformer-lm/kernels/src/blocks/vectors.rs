//! AVX-512 BF16: a vector's pairs are multiplied with another's, and both products added to a sum (`VDPBF16PS`).

use std::arch::x86_64::*;

use half::bf16;

use crate::{PANEL, Pair, PanelRow, View, Window};

/// Sums in a vector.
const LANES: usize = 16;

/// Vectors of a row of sums.
const VECTORS: usize = PANEL / LANES;

/// Rows whose sums fit into the processor's registers.
const ROWS: usize = 6;

pub(super) fn is_available() -> bool {
    std::is_x86_feature_detected!("avx512bf16") && std::is_x86_feature_detected!("avx512f")
}

/// # Safety
/// The processor has the instructions; the shapes fit together.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn multiply(left: View<bf16>, panel: &[PanelRow], sums: &mut Window<f32>, adds: bool) {
    let [rows, _] = left.shape();
    let whole = rows - rows % ROWS;
    // SAFETY: the caller's promise.
    unsafe {
        (0..whole).step_by(ROWS).for_each(|row| multiply_rows::<ROWS>(left, row, panel, sums, adds));
        (whole..rows).for_each(|row| multiply_rows::<1>(left, row, panel, sums, adds));
    }
}

/// Some rows, from `first` on.
///
/// # Safety
/// As above.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply_rows<const N: usize>(
    left: View<bf16>,
    first: usize,
    panel: &[PanelRow],
    sums: &mut Window<f32>,
    adds: bool,
) {
    let rows: [*const Pair; N] = std::array::from_fn(|at| left.row(first + at).as_ptr().cast());
    let mut totals = [[_mm512_setzero_ps(); VECTORS]; N];
    // SAFETY: a row of sums has a panel's columns, a row of the left matrix as many pairs as the panel has rows.
    unsafe {
        if adds {
            for (at, totals) in totals.iter_mut().enumerate() {
                let sums = sums.row(first + at).as_ptr();
                for (vector, total) in totals.iter_mut().enumerate() {
                    *total = _mm512_loadu_ps(sums.add(vector * LANES));
                }
            }
        }
        for (at, row) in panel.iter().enumerate() {
            let columns: [__m512bh; VECTORS] =
                std::array::from_fn(|vector| bits(_mm512_loadu_si512(row.as_ptr().add(vector * LANES).cast())));
            for (totals, row) in totals.iter_mut().zip(rows) {
                let pair = bits(_mm512_set1_epi32(row.add(at).read_unaligned().cast_signed()));
                for (total, columns) in totals.iter_mut().zip(columns) {
                    *total = _mm512_dpbf16_ps(*total, pair, columns);
                }
            }
        }
        for (at, totals) in totals.iter().enumerate() {
            let sums = sums.row(first + at).as_mut_ptr();
            for (vector, total) in totals.iter().enumerate() {
                _mm512_storeu_ps(sums.add(vector * LANES), *total);
            }
        }
    }
}

/// A vector of pairs as one of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn bits(pairs: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, any of which are values of either.
    unsafe { std::mem::transmute(pairs) }
}
