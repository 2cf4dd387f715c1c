//! Products of a matrix with few vectors, from either side. They cost what it costs to read the matrix, which [`multiply`] takes in 16 bits
//! too, and [`multiply_quantised`] in 9.

use super::fetch::fetch;
use super::norm::AddScaled;
use super::quantised::Quantised;
use super::{Element, LANES};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// Sums that fit into a vector of most processors.
const VECTOR: usize = 8;

/// Rows whose sums are kept before they are added up. Were both one loop, the compiler might shape the sums for their adding up, in
/// vectors of two: a third of the speed, in one build and not in the next.
const BLOCK: usize = 8;

/// `products[v][r] = Σᵢ rows[r][i] · vectors[v][i]`, products and sums in f32.
///
/// `rows` holds the matrix row by row; `vectors` some vectors, one after the other; each of `products`, one for each vector, has as
/// many elements as there are rows.
///
/// # Panics
/// If the lengths do not fit to vectors of `width` elements.
pub fn multiply<W: Element>(rows: &[W], vectors: &[f32], width: usize, products: &mut [&mut [f32]]) {
    check(rows.len().checked_div(width).unwrap_or(0), rows.len(), vectors, width, products);
    dispatch(Multiply { rows: Plain { elements: rows, width }, vectors, width, products });
}

/// [`multiply`] of a matrix of whole numbers and their scales.
///
/// # Panics
/// As [`multiply`].
pub fn multiply_quantised(rows: Quantised, vectors: &[f32], products: &mut [&mut [f32]]) {
    let [count, width] = rows.shape();
    check(count, count * width, vectors, width, products);
    dispatch(Multiply { rows, vectors, width, products });
}

fn check(count: usize, elements: usize, vectors: &[f32], width: usize, products: &[&mut [f32]]) {
    assert!(count * width == elements && vectors.len() == products.len() * width, "lengths that do not fit");
    assert!(products.iter().all(|product| product.len() == count), "a product has an element for each row");
}

/// `out = Σᵢ weights[i] · rows[i]`, where a row is as long as `out`.
///
/// # Panics
/// If there are not as many rows as weights.
pub fn weighted_sum(rows: &[f32], weights: &[f32], out: &mut [f32]) {
    assert!(!out.is_empty() && rows.len() == weights.len() * out.len());
    dispatch(WeightedSum { rows, weights, out });
}

/// A matrix's rows, as [`Multiply`] reads them.
pub(super) trait Rows {
    fn count(&self) -> usize;

    /// The sums of products of a row and a vector, side by side; those of what is too short for lanes are left out.
    fn lane_sums(&self, row: usize, vector: &[f32]) -> [f32; LANES];

    /// The product of what was left out.
    fn rest(&self, row: usize, vector: &[f32]) -> f32;
}

struct Multiply<'a, 'b, R> {
    rows: R,
    vectors: &'a [f32],
    width: usize,
    products: &'a mut [&'b mut [f32]],
}

impl<R: Rows> Kernel for Multiply<'_, '_, R> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut sums = [[0.0; LANES]; BLOCK];
        for first in (0..self.rows.count()).step_by(BLOCK) {
            let rows = first..self.rows.count().min(first + BLOCK);
            for (vector, product) in self.vectors.chunks_exact(self.width).zip(self.products.iter_mut()) {
                for (sums, row) in sums.iter_mut().zip(rows.clone()) {
                    *sums = self.rows.lane_sums(row, vector);
                }
                for sums in &mut sums {
                    add_halves(sums, VECTOR);
                }
                for (sums, row) in sums.iter_mut().zip(rows.clone()) {
                    add_halves(&mut sums[..VECTOR], 1);
                    product[row] = sums[0] + self.rows.rest(row, vector);
                }
            }
        }
    }
}

/// How far ahead of what is read the memory is asked for more, in bytes: the fewer bytes an element has, the fewer of them the processor
/// asks for by itself while it computes.
const AHEAD: usize = 4096;

#[inline(always)]
pub(super) fn fetch_ahead<T>(elements: &[T; LANES]) {
    fetch(elements.as_ptr().wrapping_byte_add(AHEAD), LANES);
}

/// Elements, row by row.
struct Plain<'a, W> {
    elements: &'a [W],
    width: usize,
}

impl<'a, W> Plain<'a, W> {
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [W] {
        &self.elements[row * self.width..][..self.width]
    }
}

impl<W: Element> Rows for Plain<'_, W> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.elements.len() / self.width
    }

    #[inline(always)]
    fn lane_sums(&self, row: usize, vector: &[f32]) -> [f32; LANES] {
        let mut sums = [0.0; LANES];
        for (a, b) in self.row(row).as_chunks::<LANES>().0.iter().zip(vector.as_chunks::<LANES>().0) {
            fetch_ahead(a);
            for lane in 0..LANES {
                sums[lane] += a[lane].widen() * b[lane];
            }
        }
        sums
    }

    #[inline(always)]
    fn rest(&self, row: usize, vector: &[f32]) -> f32 {
        let (row, vector) = (self.row(row).as_chunks::<LANES>().1, vector.as_chunks::<LANES>().1);
        row.iter().zip(vector).map(|(a, b)| a.widen() * b).sum()
    }
}

struct WeightedSum<'a> {
    rows: &'a [f32],
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for WeightedSum<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        self.out.fill(0.0);
        for (row, weight) in self.rows.chunks_exact(self.out.len()).zip(self.weights) {
            AddScaled { values: row, factor: *weight, sum: self.out }.run::<I>();
        }
    }
}

/// Adds the second half to the first until there are `few`: one after the other would take longer than a short row.
#[inline(always)]
fn add_halves(sums: &mut [f32], few: usize) {
    let mut half = sums.len() / 2;
    while half >= few {
        let (low, high) = sums.split_at_mut(half);
        for lane in 0..half {
            low[lane] += high[lane];
        }
        half /= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::super::quantised::{QUANTUM, quantise};
    use super::super::tests::{check_levels, numbers};
    use super::*;
    use half::bf16;
    use hvd_kernels::simd::{Level, dispatch_at};

    /// Small whole numbers, so that every sum is exact.
    fn whole(i: usize) -> f32 {
        (i * 7 % 23) as f32 - 11.0
    }

    fn at<W: Element>(level: Level, rows: &[W], vectors: &[f32], width: usize) -> Vec<Vec<f32>> {
        let mut products = vec![vec![0.0; rows.len() / width]; vectors.len() / width];
        let mut slices: Vec<&mut [f32]> = products.iter_mut().map(Vec::as_mut_slice).collect();
        dispatch_at(level, Multiply { rows: Plain { elements: rows, width }, vectors, width, products: &mut slices });
        products
    }

    fn quantised_at(level: Level, rows: Quantised, vectors: &[f32]) -> Vec<Vec<f32>> {
        let [count, width] = rows.shape();
        let mut products = vec![vec![0.0; count]; vectors.len() / width];
        let mut slices: Vec<&mut [f32]> = products.iter_mut().map(Vec::as_mut_slice).collect();
        dispatch_at(level, Multiply { rows, vectors, width, products: &mut slices });
        products
    }

    /// The products of the numbers that the quantised ones stand for, at every level with the same bits.
    #[test]
    fn quantised_rows_are_multiplied_as_what_they_stand_for() {
        for (rows, width, vectors) in
            [(1, 1, 1), (3, 31, 2), (5, 32, 1), (4, 100, 3), (19, 70, 2), (9, 768, 1), (0, 7, 1)]
        {
            let matrix: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37).sin()).collect();
            let (numbers, scales) = quantise(&matrix, width);
            let rows = Quantised::new(&numbers, &scales, width);
            let given: Vec<f32> = (0..vectors * width).map(|i| (i as f32).cos()).collect();
            let stands_for = |at: usize| {
                let scale = scales[at / width * width.div_ceil(QUANTUM) + at % width / QUANTUM];
                f64::from(numbers[at]) * f64::from(scale)
            };
            let found = quantised_at(Level::best(), rows, &given);
            for (product, vector) in found.iter().zip(given.chunks_exact(width)) {
                for (row, product) in product.iter().enumerate() {
                    let terms = |i: usize| stands_for(row * width + i) * f64::from(vector[i]);
                    let (sum, size): (f64, f64) =
                        (0..width).map(terms).fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    assert!((f64::from(*product) - sum).abs() <= 1e-6 * size, "{width}: {product} for {sum}");
                }
            }
            assert!(Level::available().all(|level| quantised_at(level, rows, &given) == found));
        }
    }

    #[test]
    fn products_are_those_of_plain_sums_at_every_level() {
        for (rows, width, vectors) in [(1, 1, 1), (3, 31, 2), (5, 32, 1), (4, 100, 3), (19, 70, 2), (0, 7, 1)] {
            let matrix: Vec<f32> = (0..rows * width).map(whole).collect();
            let narrow: Vec<bf16> = matrix.iter().map(|&value| bf16::from_f32(value)).collect();
            let given: Vec<f32> = (0..vectors * width).map(|i| whole(i + 3)).collect();
            let product = |row: &[f32], vector: &[f32]| row.iter().zip(vector).map(|(a, b)| a * b).sum::<f32>();
            let products = |vector| matrix.chunks_exact(width).map(|row| product(row, vector)).collect::<Vec<_>>();
            let expected: Vec<_> = given.chunks_exact(width).map(products).collect();
            for level in Level::available() {
                assert_eq!(at(level, &matrix, &given, width), expected, "{rows} {width} {level:?}");
                assert_eq!(at(level, &narrow, &given, width), expected, "{rows} {width} {level:?}");
            }
        }
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        let matrix: Vec<f32> = (0..7 * 333).map(|i| (i as f32).sin()).collect();
        let narrow: Vec<bf16> = matrix.iter().map(|&value| bf16::from_f32(value)).collect();
        let vector: Vec<f32> = (0..333).map(|i| (i as f32).cos()).collect();
        let bits = |level| {
            let products = [at(level, &matrix, &vector, 333), at(level, &narrow, &vector, 333)].concat().concat();
            products.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert!(Level::available().all(|level| bits(level) == bits(Level::Baseline)));
    }

    #[test]
    fn sums_of_rows_are_weighted_with_the_same_bits_at_every_level() {
        let mut out = [9.0; 3];
        weighted_sum(&[1.0, 2.0, 3.0, 10.0, 20.0, 30.0], &[2.0, 0.5], &mut out);
        assert_eq!(out, [7.0, 14.0, 21.0]);
        let (rows, weights) = (numbers(5 * 203), numbers(5));
        check_levels(|level| {
            let mut sum = vec![0.0; 203];
            dispatch_at(level, WeightedSum { rows: &rows, weights: &weights, out: &mut sum });
            sum
        });
    }

    #[test]
    #[should_panic(expected = "lengths that do not fit")]
    fn lengths_are_checked() {
        multiply(&[bf16::ONE; 6], &[1.0; 4], 3, &mut [&mut [0.0; 2]]);
    }
}
