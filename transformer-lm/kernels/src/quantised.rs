//! Numbers of 8 bits: each [`QUANTUM`] neighbours of a row are whole numbers times one scale, 9 bits for each in all.

use hvd_kernels::simd::{Isa, Kernel, dispatch};

use super::LANES;
use super::product::{Rows, fetch_ahead};

/// How many neighbours share a scale; the last of a row may be fewer.
pub const QUANTUM: usize = LANES;

/// The greatest of the whole numbers; as far below zero is the least.
const GREATEST: f32 = 127.0;

/// The whole numbers nearest to those of a matrix, row by row, and the scales, those of a row after those of the one before. The greatest
/// number of those that share a scale stays what it is but for rounding; no other is off by more than half a scale.
///
/// # Panics
/// If the matrix is not whole rows.
pub fn quantise(matrix: &[f32], width: usize) -> (Vec<i8>, Vec<f32>) {
    assert!(width > 0 && matrix.len().is_multiple_of(width));
    let (mut numbers, mut scales) = (vec![0; matrix.len()], vec![0.0; matrix.len() / width * width.div_ceil(QUANTUM)]);
    dispatch(Quantise { matrix, width, numbers: &mut numbers, scales: &mut scales });
    (numbers, scales)
}

struct Quantise<'a> {
    matrix: &'a [f32],
    width: usize,
    numbers: &'a mut [i8],
    scales: &'a mut [f32],
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let rows = self.matrix.chunks_exact(self.width).zip(self.numbers.chunks_exact_mut(self.width));
        let mut scales = self.scales;
        for (values, numbers) in rows {
            let (of_this, rest) = scales.split_at_mut(values.len().div_ceil(QUANTUM));
            for ((values, numbers), scale) in values.chunks(QUANTUM).zip(numbers.chunks_mut(QUANTUM)).zip(of_this) {
                *scale = quantise_together(values, numbers);
            }
            scales = rest;
        }
    }
}

/// The scale of values that share it, and their whole numbers.
#[inline(always)]
fn quantise_together(values: &[f32], numbers: &mut [i8]) -> f32 {
    // Without their signs numbers are ordered as their bits are. What is no number comes last, and so stays what it is: it is seen.
    let greatest = values.iter().map(|value| value.abs().to_bits()).max().unwrap_or(0);
    let scale = f32::from_bits(greatest) / GREATEST;
    let inverse = Some(1.0 / scale).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    for (number, value) in numbers.iter_mut().zip(values) {
        // Out of range is only what rounding made so.
        *number = (value * inverse).round_ties_even().clamp(-GREATEST, GREATEST) as i8;
    }
    scale
}

/// A matrix that [`quantise`] made, or some rows of it.
#[derive(Clone, Copy, Debug)]
pub struct Quantised<'a> {
    numbers: &'a [i8],
    scales: &'a [f32],
    width: usize,
}

impl<'a> Quantised<'a> {
    /// # Panics
    /// If there are not whole rows, or not as many scales as they need.
    pub fn new(numbers: &'a [i8], scales: &'a [f32], width: usize) -> Self {
        assert!(width > 0 && numbers.len().is_multiple_of(width));
        assert_eq!(scales.len(), numbers.len() / width * width.div_ceil(QUANTUM));
        Self { numbers, scales, width }
    }

    /// Its rows, and the elements of a row.
    pub fn shape(&self) -> [usize; 2] {
        [self.numbers.len() / self.width, self.width]
    }

    /// Its parts of so many rows; the last may have fewer.
    ///
    /// # Panics
    /// If that is none.
    pub fn chunks(self, rows: usize) -> impl Iterator<Item = Quantised<'a>> {
        let scales = self.scales.chunks(rows * self.width.div_ceil(QUANTUM));
        let numbers = self.numbers.chunks(rows * self.width);
        numbers.zip(scales).map(move |(numbers, scales)| Quantised { numbers, scales, ..self })
    }

    #[inline(always)]
    fn row(&self, row: usize) -> (&'a [i8], &'a [f32]) {
        let scales = self.width.div_ceil(QUANTUM);
        (&self.numbers[row * self.width..][..self.width], &self.scales[row * scales..][..scales])
    }
}

impl Rows for Quantised<'_> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.numbers.len() / self.width
    }

    #[inline(always)]
    fn lane_sums(&self, row: usize, vector: &[f32]) -> [f32; LANES] {
        let (numbers, scales) = self.row(row);
        let mut sums = [0.0; LANES];
        for ((a, b), scale) in numbers.as_chunks::<LANES>().0.iter().zip(vector.as_chunks::<LANES>().0).zip(scales) {
            fetch_ahead(a);
            for lane in 0..LANES {
                sums[lane] += f32::from(a[lane]) * scale * b[lane];
            }
        }
        sums
    }

    #[inline(always)]
    fn rest(&self, row: usize, vector: &[f32]) -> f32 {
        let (numbers, scales) = self.row(row);
        let (numbers, vector) = (numbers.as_chunks::<LANES>().1, vector.as_chunks::<LANES>().1);
        let scale = scales.last().copied().unwrap_or_default();
        numbers.iter().zip(vector).map(|(a, b)| f32::from(*a) * scale * b).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hvd_kernels::simd::{Level, dispatch_at};

    #[test]
    fn numbers_are_off_by_at_most_half_a_scale() {
        let (width, rows) = (QUANTUM + 5, 7);
        let matrix: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.7).sin() * (i / 20 + 1) as f32).collect();
        let (numbers, scales) = quantise(&matrix, width);
        assert_eq!((numbers.len(), scales.len()), (matrix.len(), 2 * rows));
        for (at, (number, value)) in numbers.iter().zip(&matrix).enumerate() {
            let scale = scales[at / width * 2 + at % width / QUANTUM];
            assert!((f32::from(*number) * scale - value).abs() <= scale * 0.5001, "{number} · {scale} for {value}");
        }
        let greatest = numbers.chunks(width).map(|row| row[..QUANTUM].iter().map(|n| n.unsigned_abs()).max());
        assert!(greatest.into_iter().all(|most| most == Some(127)));
    }

    #[test]
    fn every_processor_finds_the_same() {
        let (width, rows) = (2 * QUANTUM + 3, 3);
        let matrix: Vec<f32> = (0..rows * width).map(|i| (i as f32).sin()).collect();
        let expected = quantise(&matrix, width);
        for level in Level::available() {
            let (mut numbers, mut scales) = (vec![9; rows * width], vec![9.0; rows * 3]);
            dispatch_at(level, Quantise { matrix: &matrix, width, numbers: &mut numbers, scales: &mut scales });
            assert_eq!((numbers, scales), expected, "{level:?}");
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_no_number_is_seen() {
        assert_eq!(quantise(&[0.0; 3], 3), (vec![0; 3], vec![0.0]));
        for bad in [f32::INFINITY, f32::NAN] {
            assert!(!quantise(&[1.0, bad, 2.0], 3).1[0].is_finite());
        }
        assert_eq!(quantise(&[1e-40, 0.0], 2).0, [0, 0]);
        assert_eq!(quantise(&[], 3), (vec![], vec![]));
    }

    #[test]
    fn parts_have_their_own_scales() {
        let matrix: Vec<f32> = (0..5 * 40).map(|i| i as f32).collect();
        let (numbers, scales) = quantise(&matrix, 40);
        let parts: Vec<_> = Quantised::new(&numbers, &scales, 40).chunks(2).collect();
        assert_eq!(parts.iter().map(Quantised::shape).collect::<Vec<_>>(), [[2, 40], [2, 40], [1, 40]]);
        assert_eq!(parts[2].row(0), (&numbers[160..], &scales[8..]));
    }
}
