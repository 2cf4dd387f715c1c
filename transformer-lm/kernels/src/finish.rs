//! What becomes of a block of a product's sums while it is in the cache. A block has rows of [`PANEL`] sums, of which the first are the
//! result's columns.

use half::bf16;

use super::activation::{gate, slope};
use super::{Element, PANEL, View, Window};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// `out = sums + bias`.
///
/// # Panics
/// If the block has not a row for each of `out`, or a vector not an element for each column; so below.
pub fn store<E: Element>(sums: &[f32], bias: Option<&[f32]>, out: Window<E>) {
    check(sums, bias, out.shape());
    dispatch(Store { sums, bias, out });
}

/// `out = sums · factors`.
pub fn multiply_by(factors: View<bf16>, sums: &[f32], out: Window<bf16>) {
    check(sums, None, out.shape());
    check(sums, None, factors.shape());
    dispatch(MultiplyBy { factors, sums, out });
}

/// `out = base + (sums + bias)`.
pub fn add_to(base: View<f32>, sums: &[f32], bias: &[f32], out: Window<f32>) {
    check(sums, Some(bias), out.shape());
    check(sums, Some(bias), base.shape());
    dispatch(AddTo { base, sums, bias, out });
}

/// `out = gelu(sums + bias)`, and the slopes there, where somebody wants them.
pub fn gelu(sums: &[f32], bias: &[f32], out: Window<bf16>, slopes: Option<Window<bf16>>) {
    check(sums, Some(bias), out.shape());
    match slopes {
        Some(slopes) => {
            check(sums, Some(bias), slopes.shape());
            dispatch(Gelu::<true> { sums, bias, out, slopes });
        }
        None => dispatch(Gelu::<false> { sums, bias, out, slopes: Window::of(&mut [], 1) }),
    }
}

fn check(sums: &[f32], bias: Option<&[f32]>, [rows, columns]: [usize; 2]) {
    assert!(sums.len() == rows * PANEL && columns <= PANEL && bias.is_none_or(|bias| bias.len() == columns));
}

fn block_rows(sums: &[f32]) -> impl Iterator<Item = (usize, &[f32; PANEL])> {
    sums.as_chunks::<PANEL>().0.iter().enumerate()
}

struct Store<'a, E> {
    sums: &'a [f32],
    bias: Option<&'a [f32]>,
    out: Window<'a, E>,
}

impl<E: Element> Kernel for Store<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        for (at, sums) in block_rows(self.sums) {
            let out = self.out.row(at);
            match self.bias {
                Some(bias) => {
                    for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                        *out = E::narrow(sum + bias);
                    }
                }
                None => {
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out = E::narrow(*sum);
                    }
                }
            }
        }
    }
}

struct MultiplyBy<'a> {
    factors: View<'a, bf16>,
    sums: &'a [f32],
    out: Window<'a, bf16>,
}

impl Kernel for MultiplyBy<'_> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        for (at, sums) in block_rows(self.sums) {
            let given = self.factors.row(at).iter().zip(sums);
            for (out, (factor, sum)) in self.out.row(at).iter_mut().zip(given) {
                *out = bf16::narrow(sum * factor.widen());
            }
        }
    }
}

struct AddTo<'a> {
    base: View<'a, f32>,
    sums: &'a [f32],
    bias: &'a [f32],
    out: Window<'a, f32>,
}

impl Kernel for AddTo<'_> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        for (at, sums) in block_rows(self.sums) {
            let given = self.base.row(at).iter().zip(sums).zip(self.bias);
            for (out, ((base, sum), bias)) in self.out.row(at).iter_mut().zip(given) {
                *out = base + (sum + bias);
            }
        }
    }
}

struct Gelu<'a, const SLOPES: bool> {
    sums: &'a [f32],
    bias: &'a [f32],
    out: Window<'a, bf16>,
    /// Empty where they are not wanted.
    slopes: Window<'a, bf16>,
}

impl<const SLOPES: bool> Kernel for Gelu<'_, SLOPES> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        for (at, sums) in block_rows(self.sums) {
            let given = sums.iter().zip(self.bias).map(|(sum, bias)| sum + bias);
            match SLOPES {
                true => {
                    let results = self.out.row(at).iter_mut().zip(self.slopes.row(at));
                    for (value, (out, slope_out)) in given.zip(results) {
                        let gate = gate(value);
                        *out = bf16::narrow(value * gate);
                        *slope_out = bf16::narrow(slope(value, gate));
                    }
                }
                false => {
                    for (value, out) in given.zip(self.out.row(at)) {
                        *out = bf16::narrow(value * gate(value));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_levels, numbers};
    use super::*;
    use hvd_kernels::simd::dispatch_at;

    const ROWS: usize = 3;
    const COLUMNS: usize = 53;

    fn elements<E: Element>() -> Vec<E> {
        vec![E::narrow(0.5); ROWS * COLUMNS]
    }

    fn widened(values: &[bf16]) -> Vec<f32> {
        values.iter().map(|value| value.to_f32()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (sums, bias) = (&numbers(ROWS * PANEL)[..], &numbers(COLUMNS)[..]);
        check_levels(|level| {
            let [mut stored, mut given, mut slopes, mut alone] = [(); 4].map(|()| elements::<bf16>());
            let [mut plain, base, mut added] = [(); 3].map(|()| elements::<f32>());
            dispatch_at(level, Store { sums, bias: Some(bias), out: Window::of(&mut stored, COLUMNS) });
            dispatch_at(level, Store { sums, bias: None, out: Window::of(&mut plain, COLUMNS) });
            let (from, out) = (View::of(&base, COLUMNS), Window::of(&mut added, COLUMNS));
            dispatch_at(level, AddTo { base: from, sums, bias, out });
            let (out, of_slopes) = (Window::of(&mut given, COLUMNS), Window::of(&mut slopes, COLUMNS));
            dispatch_at(level, Gelu::<true> { sums, bias, out, slopes: of_slopes });
            let (out, nothing) = (Window::of(&mut alone, COLUMNS), Window::of(&mut [], 1));
            dispatch_at(level, Gelu::<false> { sums, bias, out, slopes: nothing });
            assert_eq!(given, alone);
            let (factors, out) = (View::of(&given, COLUMNS), Window::of(&mut alone, COLUMNS));
            dispatch_at(level, MultiplyBy { factors, sums, out });
            [plain, added, widened(&stored), widened(&given), widened(&alone), widened(&slopes)].concat()
        });
    }

    #[test]
    fn a_block_is_finished_column_by_column() {
        let (sums, bias) = (&numbers(ROWS * PANEL)[..], &numbers(COLUMNS)[..]);
        let [mut stored, mut added] = [(); 2].map(|()| elements::<f32>());
        let mut multiplied = elements::<bf16>();
        store(sums, Some(bias), Window::of(&mut stored, COLUMNS));
        add_to(View::of(&elements(), COLUMNS), sums, bias, Window::of(&mut added, COLUMNS));
        multiply_by(View::of(&elements(), COLUMNS), sums, Window::of(&mut multiplied, COLUMNS));
        for at in 0..ROWS * COLUMNS {
            let (row, column) = (at / COLUMNS, at % COLUMNS);
            let (sum, bias) = (sums[row * PANEL + column], bias[column]);
            assert_eq!((stored[at], added[at]), (sum + bias, 0.5 + (sum + bias)));
            assert_eq!(multiplied[at], bf16::from_f32(0.5 * sum));
        }
    }
}
