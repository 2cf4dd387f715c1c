//! Masks of dropout that are computed where they are needed and kept nowhere: what becomes of an element follows from a key, the
//! element's row and its column.
//!
//! The random numbers are Threefry-2x32's with 13 rounds (Salmon et al., 2011, Parallel random numbers: as easy as 1, 2, 3).

use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// Counters whose random numbers are computed side by side. Which element has which of them follows from it: with another number the masks
/// would be others.
const LANES: usize = 16;

/// What dropout does to a matrix: each element is dropped with the same probability, and what is kept grows, so that the mean
/// stays. A row has the same mask whatever is computed beside it.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    key: [u32; 2],
    /// The row that comes first in what the functions here are given.
    first_row: usize,
    /// Of 2^32 random numbers, how many drop an element.
    dropped: u32,
    /// What is kept is multiplied by this.
    factor: f32,
}

impl Mask {
    /// The mask of a key; different keys have independent ones. The probability is in [0, 1).
    pub fn new(key: u64, probability: f64) -> Mask {
        let dropped = (probability * 2f64.powi(32)) as u32;
        let kept = 1.0 - f64::from(dropped) / 2f64.powi(32);
        Mask { key: [key as u32, (key >> 32) as u32], first_row: 0, dropped, factor: (1.0 / kept) as f32 }
    }

    /// The same from this row on.
    pub fn from_row(self, row: usize) -> Mask {
        Mask { first_row: self.first_row + row, ..self }
    }

    /// What the first elements of a row are multiplied by: 0, or the factor of what is kept.
    #[inline(always)]
    pub(super) fn factors_of(self, row: usize, factors: &mut [f32]) {
        let row = (self.first_row + row) as u32;
        let mut first = 0;
        let (chunks, rest) = factors.as_chunks_mut();
        for chunk in chunks {
            *chunk = self.chunk(row, first);
            first = first.wrapping_add(LANES as u32);
        }
        rest.copy_from_slice(&self.chunk(row, first)[..rest.len()]);
    }

    /// The factors that the random numbers of [`LANES`] counters give, two for each.
    #[inline(always)]
    fn chunk(self, row: u32, first: u32) -> [f32; 2 * LANES] {
        let (a, b) = threefry(self.key, row, first);
        let mut factors = [0.0; 2 * LANES];
        for lane in 0..LANES {
            factors[lane] = self.factor_of(a[lane]);
            factors[LANES + lane] = self.factor_of(b[lane]);
        }
        factors
    }

    #[inline(always)]
    fn factor_of(self, bits: u32) -> f32 {
        if bits < self.dropped { 0.0 } else { self.factor }
    }
}

/// Rows of `columns` elements become what the mask multiplies an element there by.
///
/// # Panics
/// If they are not whole rows.
pub fn mask_factors(mask: Mask, columns: usize, rows: &mut [f32]) {
    assert!(columns > 0 && rows.len().is_multiple_of(columns));
    dispatch(Factors { mask, columns, rows });
}

struct Factors<'a> {
    mask: Mask,
    columns: usize,
    rows: &'a mut [f32],
}

impl Kernel for Factors<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (r, row) in self.rows.chunks_exact_mut(self.columns).enumerate() {
            self.mask.factors_of(r, row);
        }
    }
}

type Lanes = [u32; LANES];

/// The random numbers of the counters (`high`, `low`), (`high`, `low + 1`) and so on, two for each. With 13 rounds and more Threefry passes all
/// tests of BigCrush. They stand here one by one, as the compiler would else not unroll them, and turn by a variable.
#[inline(always)]
fn threefry([k0, k1]: [u32; 2], high: u32, low: u32) -> (Lanes, Lanes) {
    let k2 = k0 ^ k1 ^ 0x1BD1_1BDA;
    let (mut a, mut b) = ([high; LANES], std::array::from_fn(|lane| low.wrapping_add(lane as u32)));
    add(&mut a, k0, &mut b, k1);
    rounds::<13, 15, 26, 6>(&mut a, &mut b);
    add(&mut a, k1, &mut b, k2.wrapping_add(1));
    rounds::<17, 29, 16, 24>(&mut a, &mut b);
    add(&mut a, k2, &mut b, k0.wrapping_add(2));
    rounds::<13, 15, 26, 6>(&mut a, &mut b);
    add(&mut a, k0, &mut b, k1.wrapping_add(3));
    round::<17>(&mut a, &mut b);
    (a, b)
}

/// Adds parts of the key.
#[inline(always)]
fn add(a: &mut Lanes, to_a: u32, b: &mut Lanes, to_b: u32) {
    for lane in 0..LANES {
        a[lane] = a[lane].wrapping_add(to_a);
        b[lane] = b[lane].wrapping_add(to_b);
    }
}

#[inline(always)]
fn rounds<const R0: u32, const R1: u32, const R2: u32, const R3: u32>(a: &mut Lanes, b: &mut Lanes) {
    round::<R0>(a, b);
    round::<R1>(a, b);
    round::<R2>(a, b);
    round::<R3>(a, b);
}

/// A round that turns by `R` bits.
#[inline(always)]
fn round<const R: u32>(a: &mut Lanes, b: &mut Lanes) {
    for lane in 0..LANES {
        a[lane] = a[lane].wrapping_add(b[lane]);
        b[lane] = b[lane].rotate_left(R) ^ a[lane];
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::check_levels;
    use super::*;
    use hvd_kernels::simd::dispatch_at;

    /// From `kat_vectors` of the authors' library, Random123.
    #[test]
    fn random_numbers_are_those_of_the_authors() {
        let first = |key, high, low| {
            let (a, b) = threefry(key, high, low);
            [a[0], b[0]]
        };
        assert_eq!(first([0; 2], 0, 0), [0x9D1C_5EC6, 0x8BD5_0731]);
        assert_eq!(first([u32::MAX; 2], u32::MAX, u32::MAX), [0xFD36_D048, 0x2D17_272C]);
        assert_eq!(first([0x1319_8A2E, 0x0370_7344], 0x243F_6A88, 0x85A3_08D3), [0xBA3E_4725, 0xF27D_669E]);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        check_levels(|level| {
            let mut rows = vec![9.0; 5 * 203];
            dispatch_at(level, Factors { mask: Mask::new(7, 0.3), columns: 203, rows: &mut rows });
            rows
        });
    }

    fn factors(key: u64, probability: f64, rows: usize, columns: usize) -> Vec<f32> {
        let mut factors = vec![9.0; rows * columns];
        mask_factors(Mask::new(key, probability), columns, &mut factors);
        factors
    }

    /// The share of the elements that two masks do not agree on.
    fn share_of_differences(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).filter(|(a, b)| a != b).count() as f64 / a.len() as f64
    }

    #[test]
    fn as_many_are_dropped_as_was_asked_for_and_the_mean_stays() {
        for probability in [0.0, 0.1, 0.5, 0.9] {
            let factors = factors(3, probability, 300, 1000);
            let mean = factors.iter().map(|&factor| f64::from(factor)).sum::<f64>() / 3e5;
            let dropped = factors.iter().filter(|&&factor| factor == 0.0).count() as f64 / 3e5;
            let kept = (1.0 / (1.0 - probability)) as f32;
            assert!(factors.iter().all(|&factor| factor == 0.0 || (factor - kept).abs() < 1e-6), "{probability}");
            let spread = (probability * (1.0 - probability) / 3e5).sqrt(); // of the share
            assert!((dropped - probability).abs() <= 5.0 * spread, "{probability}: {dropped}");
            assert!((mean - 1.0).abs() <= 5.0 * spread / (1.0 - probability) + 1e-6, "{probability}: {mean}");
        }
    }

    #[test]
    fn keys_rows_and_columns_are_independent() {
        let probability = 0.3;
        let (rows, columns) = (400, 500);
        let mask = factors(11, probability, rows, columns);
        let expected = 2.0 * probability * (1.0 - probability);
        let tolerance = 5.0 * (expected * (1.0 - expected) / (rows * columns) as f64).sqrt() + 0.01 * expected;
        let shifted = |by: usize| [&mask[by..], &mask[..by]].concat();
        let others = [12, 11 << 32, 11 | 1 << 32].map(|key| factors(key, probability, rows, columns));
        let shifts = [1, LANES, 2 * LANES, columns, columns + 1, 7 * columns].map(shifted);
        for (at, other) in others.iter().chain(&shifts).enumerate() {
            let share = share_of_differences(&mask, other);
            assert!((share - expected).abs() < tolerance, "{at}: {share}, expected {expected}");
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_shorter() {
        let whole = factors(5, 0.4, 8, 101);
        for (row, columns) in [(0, 101), (3, 101), (3, 64), (7, 33), (7, 1)] {
            let mut alone = vec![9.0; columns];
            mask_factors(Mask::new(5, 0.4).from_row(row), columns, &mut alone);
            assert_eq!(alone, whole[row * 101..][..columns], "{row} {columns}");
        }
    }

    #[test]
    #[should_panic(expected = "is_multiple_of")]
    fn only_whole_rows_are_served() {
        mask_factors(Mask::new(1, 0.5), 3, &mut [0.0; 4]);
    }
}
