//! Products of a matrix with few vectors, which cost what it costs to read the matrix: it is kept in 16 bits.

use half::bf16;

use hvd_kernels::simd::{Isa, Kernel, dispatch};
use hvd_kernels::wire::widen_bf16;

/// Sums that are kept side by side, so that the compiler can use vectors; a fixed number, so that the order of summation is the same
/// on every CPU.
const LANES: usize = 32;

/// `products[v][r] = Σᵢ rows[r][i] · vectors[v][i]`, products and sums in f32.
///
/// `rows` holds the matrix row by row; `vectors` some vectors, one after the other; each of `products`, one for each vector, has as
/// many elements as there are rows.
///
/// # Panics
/// If the lengths do not fit to vectors of `width` elements.
pub fn multiply(rows: &[bf16], vectors: &[f32], width: usize, products: &mut [&mut [f32]]) {
    let count = rows.len().checked_div(width).unwrap_or(0);
    assert!(count * width == rows.len() && vectors.len() == products.len() * width, "lengths that do not fit");
    assert!(products.iter().all(|product| product.len() == count), "a product has an element for each row");
    dispatch(Multiply { rows, vectors, width, products });
}

struct Multiply<'a, 'b> {
    rows: &'a [bf16],
    vectors: &'a [f32],
    width: usize,
    products: &'a mut [&'b mut [f32]],
}

impl Kernel for Multiply<'_, '_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (r, row) in self.rows.chunks_exact(self.width).enumerate() {
            for (vector, product) in self.vectors.chunks_exact(self.width).zip(self.products.iter_mut()) {
                product[r] = dot(row, vector);
            }
        }
    }
}

#[inline(always)]
fn dot(row: &[bf16], vector: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (row, row_rest) = row.as_chunks::<LANES>();
    let (vector, vector_rest) = vector.as_chunks::<LANES>();
    for (a, b) in row.iter().zip(vector) {
        for lane in 0..LANES {
            sums[lane] += widen_bf16(a[lane].to_bits()) * b[lane];
        }
    }
    let rest: f32 = row_rest.iter().zip(vector_rest).map(|(a, b)| widen_bf16(a.to_bits()) * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use hvd_kernels::simd::{Level, dispatch_at};

    /// Small whole numbers, so that every sum is exact.
    fn whole(i: usize) -> f32 {
        (i * 7 % 23) as f32 - 11.0
    }

    #[test]
    fn products_are_those_of_plain_sums_at_every_level() {
        for (rows, width, vectors) in [(1, 1, 1), (3, 31, 2), (5, 32, 1), (4, 100, 3), (0, 7, 1)] {
            let matrix: Vec<bf16> = (0..rows * width).map(|i| bf16::from_f32(whole(i))).collect();
            let given: Vec<f32> = (0..vectors * width).map(|i| whole(i + 3)).collect();
            let expected =
                |v: usize, r: usize| (0..width).map(|i| whole(r * width + i) * whole(v * width + i + 3)).sum::<f32>();
            for level in Level::available() {
                let mut products = vec![vec![0.0; rows]; vectors];
                let mut slices: Vec<&mut [f32]> = products.iter_mut().map(Vec::as_mut_slice).collect();
                dispatch_at(level, Multiply { rows: &matrix, vectors: &given, width, products: &mut slices });
                for (v, product) in products.iter().enumerate() {
                    assert_eq!(
                        *product,
                        (0..rows).map(|r| expected(v, r)).collect::<Vec<_>>(),
                        "{rows} {width} {level:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_level_gives_the_same_bits() {
        let matrix: Vec<bf16> = (0..7 * 333).map(|i| bf16::from_f32((i as f32).sin())).collect();
        let vector: Vec<f32> = (0..333).map(|i| (i as f32).cos()).collect();
        let at = |level| {
            let mut product = vec![0.0; 7];
            dispatch_at(level, Multiply { rows: &matrix, vectors: &vector, width: 333, products: &mut [&mut product] });
            product.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        assert!(Level::available().all(|level| at(level) == at(Level::Baseline)));
    }

    #[test]
    #[should_panic(expected = "lengths that do not fit")]
    fn lengths_are_checked() {
        multiply(&[bf16::ONE; 6], &[1.0; 4], 3, &mut [&mut [0.0; 2]]);
    }
}
