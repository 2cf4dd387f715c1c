//! Products of bf16 with sums in f32, on the processor's matrix unit (Intel AMX) or its vectors (AVX-512 BF16): of blocks, by the routine of
//! oneDNN's from which libtorch makes its own kernels, on the calling thread; and of whole matrices by MKL's, on torch's threads.

use std::sync::OnceLock;

use half::bf16;

use crate::error::Result;
use crate::shim;

/// A product's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the left matrix and of the result.
    pub rows: usize,
    /// Columns of the right matrix and of the result.
    pub columns: usize,
    /// Columns of the left matrix and rows of the right one: a multiple of 2 in a product of blocks.
    pub depth: usize,
    /// Elements from one row to the next: of the left matrix, the right one, and the result.
    pub strides: [usize; 3],
}

/// Whether this processor and this libtorch have such products.
pub fn is_served() -> bool {
    static SERVED: OnceLock<bool> = OnceLock::new();
    *SERVED.get_or_init(|| has_bf16() && shim::has_transposed_product() && probe())
}

fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx512bf16") && std::is_x86_feature_detected!("avx512bw");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether a small product comes out right.
fn probe() -> bool {
    const N: usize = 16;
    let (ones, mut sums) = ([bf16::ONE; 2 * N * N], [0.0; N * N]);
    let shape = Shape { rows: N, columns: N, depth: 2 * N, strides: [2 * N, N, N] };
    // SAFETY: the left matrix is 16 × 32, the right one 32 × 16, the result 16 × 16.
    let made = unsafe { product(shape, ones.as_ptr(), ones.as_ptr(), sums.as_mut_ptr(), false) };
    made.and_then(|()| release()).is_ok() && sums == [2.0 * N as f32; N * N]
}

/// `sums = left · right`, or `sums += left · right` where it adds. Of the right matrix row `2r` and row `2r + 1` lie together: for each column
/// the pair of their elements, and `strides[1]` pairs on the next two rows' (16, 32, 48 or 64). Call [`release`] after the last
/// product of a loop, on the same thread.
///
/// # Errors
/// With oneDNN's reason; what [`is_served`] and fits the shape has none.
///
/// # Safety
/// The pointers are valid for matrices of the shape; nobody writes to the operands meanwhile, and nobody else uses the sums.
pub unsafe fn product(shape: Shape, left: *const bf16, right: *const bf16, sums: *mut f32, adds: bool) -> Result<()> {
    let Shape { rows, columns, depth, strides } = shape;
    // SAFETY: the caller's promise.
    unsafe { shim::block_product([rows, columns, depth], strides, adds, [left.cast(), right.cast()], sums) }
}

/// Gives back what this thread's products hold of the processor: its tiles.
///
/// # Errors
/// With oneDNN's reason.
pub fn release() -> Result<()> {
    shim::block_release()
}

/// `sums += factor · leftᵀ · right`, where all lie row by row, `strides` elements apart: the left matrix is `depth` × `rows`, the right one
/// `depth` × `columns`.
///
/// # Errors
/// Where libtorch has no such product; for a matrix of 2³¹ rows or columns.
///
/// # Safety
/// The pointers are valid for matrices of the shape; nobody writes to the operands meanwhile, and nobody else uses the sums.
pub unsafe fn add_transposed(
    shape: Shape,
    factor: f32,
    left: *const bf16,
    right: *const bf16,
    sums: *mut f32,
) -> Result<()> {
    let Shape { rows, columns, depth, strides } = shape;
    // SAFETY: the caller's promise.
    unsafe { shim::add_transposed_product([rows, columns, depth], strides, factor, [left.cast(), right.cast()], sums) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_that_of_plain_sums() {
        if !is_served() {
            println!("skipped: this processor has no products of bf16");
            return;
        }
        let (rows, columns, depth) = (5, 48, 6);
        let value = |at: usize| bf16::from_f32((at * 7 % 23) as f32 - 11.0); // sums of these are exact
        let left: Vec<bf16> = (0..rows * depth).map(value).collect();
        let right = |row: usize, column: usize| value(row * columns + column + 3);
        let pairs: Vec<bf16> = (0..depth / 2)
            .flat_map(|pair| (0..columns).flat_map(move |column| [0, 1].map(|half| right(2 * pair + half, column))))
            .collect();
        let mut sums = vec![0.5; rows * columns];
        let shape = Shape { rows, columns, depth, strides: [depth, columns, columns] };
        for (adds, times) in [(false, 1.0), (true, 2.0)] {
            // SAFETY: the vectors are as long as the shape says.
            unsafe { product(shape, left.as_ptr(), pairs.as_ptr(), sums.as_mut_ptr(), adds) }.unwrap();
            for (at, sum) in sums.iter().enumerate() {
                let (row, column) = (at / columns, at % columns);
                let terms = (0..depth).map(|k| left[row * depth + k].to_f32() * right(k, column).to_f32());
                assert_eq!(*sum, times * terms.sum::<f32>(), "{row} {column}");
            }
        }
        release().unwrap();
    }
}
