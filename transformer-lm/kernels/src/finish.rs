//! What becomes of a block of a product's sums while it is in the cache. A block has rows of [`PANEL`] sums, of which the first are the
//! result's columns.

use std::array::from_fn;

use half::bf16;

use super::activation::{gate, slope};
use super::fetch::fetch;
use super::norm::AddScaled;
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

/// `out = factor · sums`.
pub fn scale(sums: &[f32], factor: f32, out: Window<f32>) {
    check(sums, None, out.shape());
    dispatch(Scale { sums, factor, out });
}

/// `out += factor · sums`.
pub fn accumulate(sums: &[f32], factor: f32, out: Window<f32>) {
    check(sums, None, out.shape());
    dispatch(Accumulate { sums, factor, out });
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

#[inline(always)]
fn block_rows(sums: &[f32]) -> impl Iterator<Item = (usize, &[f32; PANEL])> {
    sums.as_chunks::<PANEL>().0.iter().enumerate()
}

/// Asks for what follows a block's row: the next block is beside it.
#[inline(always)]
fn fetch_next<E>(row: &[E]) {
    fetch(row.as_ptr_range().end, PANEL);
}

/// A row's elements, and zeros for those that are missing: loops over as many as a panel has need no second one for the rest.
#[inline(always)]
fn padded<E: Element>(row: &[E]) -> [E; PANEL] {
    match row.first_chunk() {
        Some(row) => *row,
        None => from_fn(|at| row.get(at).copied().unwrap_or(E::narrow(0.0))),
    }
}

/// Rounds values to a row, which may have fewer. A whole panel is a case of its own, of which the compiler knows the length.
#[inline(always)]
fn put<I: Isa, E: Element>(values: &[f32; PANEL], out: &mut Window<E>, row: usize) {
    match out.shape()[1] {
        PANEL => out.fill::<I>(row, values),
        columns => out.fill::<I>(row, &values[..columns]),
    }
}

struct Store<'a, E> {
    sums: &'a [f32],
    bias: Option<&'a [f32]>,
    out: Window<'a, E>,
}

impl<E: Element> Kernel for Store<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let bias = self.bias.map(padded);
        for (at, sums) in block_rows(self.sums) {
            let values = match &bias {
                Some(bias) => from_fn(|i| sums[i] + bias[i]),
                None => *sums,
            };
            put::<I, E>(&values, &mut self.out, at);
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
            fetch_next(self.factors.row(at));
            let factors = padded(self.factors.row(at));
            put::<I, bf16>(&from_fn(|i| sums[i] * factors[i].widen()), &mut self.out, at);
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
        let bias = padded(self.bias);
        for (at, sums) in block_rows(self.sums) {
            fetch_next(self.base.row(at));
            let base = padded(self.base.row(at));
            put::<I, f32>(&from_fn(|i| base[i] + (sums[i] + bias[i])), &mut self.out, at);
        }
    }
}

struct Scale<'a> {
    sums: &'a [f32],
    factor: f32,
    out: Window<'a, f32>,
}

impl Kernel for Scale<'_> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        for (at, sums) in block_rows(self.sums) {
            put::<I, f32>(&sums.map(|sum| self.factor * sum), &mut self.out, at);
        }
    }
}

struct Accumulate<'a> {
    sums: &'a [f32],
    factor: f32,
    out: Window<'a, f32>,
}

impl Kernel for Accumulate<'_> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        for (at, values) in block_rows(self.sums) {
            fetch_next(self.out.row(at));
            AddScaled { values, factor: self.factor, sum: self.out.row(at) }.run::<I>();
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
        let bias = padded(self.bias);
        for (at, sums) in block_rows(self.sums) {
            let (mut values, mut slopes) = ([0.0; PANEL], [0.0; PANEL]);
            for i in 0..PANEL {
                let value = sums[i] + bias[i];
                let gate = gate(value);
                values[i] = value * gate;
                if SLOPES {
                    slopes[i] = slope(value, gate);
                }
            }
            put::<I, bf16>(&values, &mut self.out, at);
            if SLOPES {
                put::<I, bf16>(&slopes, &mut self.slopes, at);
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

    fn elements<E: Element>(columns: usize) -> Vec<E> {
        vec![E::narrow(0.5); ROWS * columns]
    }

    fn widened(values: &[bf16]) -> Vec<f32> {
        values.iter().map(|value| value.to_f32()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        [53, PANEL].into_iter().for_each(check_columns);
    }

    fn check_columns(columns: usize) {
        let (sums, bias) = (&numbers(ROWS * PANEL)[..], &numbers(columns)[..]);
        check_levels(|level| {
            let [mut stored, mut given, mut slopes, mut alone] = [(); 4].map(|()| elements::<bf16>(columns));
            let [mut plain, base, mut added, mut scaled] = [(); 4].map(|()| elements::<f32>(columns));
            dispatch_at(level, Store { sums, bias: Some(bias), out: Window::of(&mut stored, columns) });
            dispatch_at(level, Store { sums, bias: None, out: Window::of(&mut plain, columns) });
            let (from, out) = (View::of(&base, columns), Window::of(&mut added, columns));
            dispatch_at(level, AddTo { base: from, sums, bias, out });
            let (out, of_slopes) = (Window::of(&mut given, columns), Window::of(&mut slopes, columns));
            dispatch_at(level, Gelu::<true> { sums, bias, out, slopes: of_slopes });
            let (out, nothing) = (Window::of(&mut alone, columns), Window::of(&mut [], 1));
            dispatch_at(level, Gelu::<false> { sums, bias, out, slopes: nothing });
            assert_eq!(given, alone);
            let (factors, out) = (View::of(&given, columns), Window::of(&mut alone, columns));
            dispatch_at(level, MultiplyBy { factors, sums, out });
            dispatch_at(level, Accumulate { sums, factor: 0.3, out: Window::of(&mut added, columns) });
            dispatch_at(level, Scale { sums, factor: 0.3, out: Window::of(&mut scaled, columns) });
            [plain, added, scaled, widened(&stored), widened(&given), widened(&alone), widened(&slopes)].concat()
        });
    }

    #[test]
    fn a_block_is_finished_column_by_column() {
        [53, PANEL].into_iter().for_each(finish_columns);
    }

    fn finish_columns(columns: usize) {
        let (sums, bias) = (&numbers(ROWS * PANEL)[..], &numbers(columns)[..]);
        let [mut stored, mut added] = [(); 2].map(|()| elements::<f32>(columns));
        let (mut multiplied, mut more, mut scaled) = (elements::<bf16>(columns), elements(columns), elements(columns));
        accumulate(sums, 2.0, Window::of(&mut more, columns));
        scale(sums, 2.0, Window::of(&mut scaled, columns));
        store(sums, Some(bias), Window::of(&mut stored, columns));
        add_to(View::of(&elements(columns), columns), sums, bias, Window::of(&mut added, columns));
        multiply_by(View::of(&elements(columns), columns), sums, Window::of(&mut multiplied, columns));
        for at in 0..ROWS * columns {
            let (row, column) = (at / columns, at % columns);
            let (sum, bias) = (sums[row * PANEL + column], bias[column]);
            assert_eq!((stored[at], added[at], more[at]), (sum + bias, 0.5 + (sum + bias), 0.5 + 2.0 * sum));
            assert_eq!((multiplied[at], scaled[at]), (bf16::from_f32(0.5 * sum), 2.0 * sum));
        }
    }
}
