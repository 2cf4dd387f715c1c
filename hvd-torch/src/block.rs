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

/// Whether small products come out right: what is asked of these libraries is not documented, and may change.
fn probe() -> bool {
    multiplies_right(5, 64, 34).unwrap_or(false)
}

/// Whether the products of matrices of small whole numbers, whose sums are exact, are those of plain loops.
fn multiplies_right(rows: usize, columns: usize, depth: usize) -> Result<bool> {
    let value = |at: usize| bf16::from_f32((at * 7 % 23) as f32 - 11.0);
    let (left, right) = (|row, k| value(row * depth + k), |k, column| value(k * columns + column + 3));
    let matrix = |rows: usize, columns: usize, element: &dyn Fn(usize, usize) -> bf16| -> Vec<bf16> {
        (0..rows * columns).map(|at| element(at / columns, at % columns)).collect()
    };
    let (a, b) = (matrix(rows, depth, &left), matrix(depth, columns, &right));
    let turned = matrix(depth, rows, &|k, row| left(row, k));
    let pairs = matrix(depth / 2, 2 * columns, &|pair, at| right(2 * pair + at % 2, at / 2));
    let mut sums = vec![0.5; rows * columns];
    let blocks = Shape { rows, columns, depth, strides: [depth, columns, columns] };
    let whole = Shape { strides: [rows, columns, columns], ..blocks };
    // SAFETY: the vectors are as long as the shapes say.
    unsafe {
        product(blocks, a.as_ptr(), pairs.as_ptr(), sums.as_mut_ptr(), false)?;
        product(blocks, a.as_ptr(), pairs.as_ptr(), sums.as_mut_ptr(), true)?;
        release()?;
        add_transposed(whole, 2.0, turned.as_ptr(), b.as_ptr(), sums.as_mut_ptr())?;
    }
    Ok((0..rows * columns).all(|at| {
        let terms = (0..depth).map(|k| left(at / columns, k).to_f32() * right(k, at % columns).to_f32());
        sums[at] == 4.0 * terms.sum::<f32>()
    }))
}

/// `sums = left · right`, or `sums += left · right` where it adds. Of the right matrix row `2r` and row `2r + 1` lie together: for each column
/// the pair of their elements, and `strides[1]` pairs on the next two rows' (16, 32, 48 or 64). Call [`release`] after the last
/// product of a loop, on the same thread.
///
/// # Errors
/// With torch's reason, for instance where its use of oneDNN was switched off.
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
    fn products_are_those_of_plain_sums() {
        if !is_served() {
            println!("skipped: this processor has no products of bf16");
            return;
        }
        for [rows, columns, depth] in [[1, 16, 2], [5, 48, 6], [64, 64, 64], [33, 64, 130]] {
            assert!(multiplies_right(rows, columns, depth).unwrap(), "{rows} {columns} {depth}");
        }
    }
}
