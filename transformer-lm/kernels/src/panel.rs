//! How products of bf16 want their operands to lie: the processor multiplies pairs of neighbours and adds both products to a sum.
//!
//! The left matrix lies row by row, neighbours along the depth that is summed over. The right one lies in *panels* of [`PANEL`] columns:
//! a row of a panel has, for each column, the pair of elements of two rows of the matrix. What is missing of a panel is zero.

use super::{Element, Window};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// Columns of a panel.
pub const PANEL: usize = 64;

/// Two bf16 that follow each other along the depth, the first in the low half.
pub type Pair = u32;

/// A row of a panel.
pub type PanelRow = [Pair; PANEL];

/// A panel of at most [`PANEL`] columns of a matrix that lies row by row, rows `stride` elements apart.
///
/// # Panics
/// If the panel is not half as high as the matrix, or the matrix is not as large as that; so below.
pub fn pack_rows<E: Element>(matrix: &[E], stride: usize, columns: usize, panel: &mut [PanelRow]) {
    let rows = rows_of(matrix.len(), stride, columns);
    assert!(columns <= PANEL && panel.len() == rows.div_ceil(2));
    dispatch(PackRows { matrix, stride, columns, rows, panel });
}

/// A panel of the matrix whose columns are the rows of this one, of which there are at most [`PANEL`], `depth` long.
pub fn pack_columns<E: Element>(matrix: &[E], stride: usize, depth: usize, panel: &mut [PanelRow]) {
    let columns = rows_of(matrix.len(), stride, depth);
    assert!(columns <= PANEL && panel.len() == depth.div_ceil(2));
    dispatch(PackColumns { matrix, stride, columns, depth, panel });
}

/// The transposed of a matrix, as the left one of a product: `out` has a row of pairs for each column, which ends with zeros.
pub fn transpose<E: Element>(matrix: &[E], stride: usize, out: Window<Pair>) {
    let [columns, pairs] = out.shape();
    let rows = rows_of(matrix.len(), stride, columns);
    assert!(rows.div_ceil(2) <= pairs);
    dispatch(Transpose { matrix, stride, rows, out });
}

/// Rows of a matrix that ends with the last row's last element, or with what lies between rows.
fn rows_of(len: usize, stride: usize, columns: usize) -> usize {
    assert!(columns > 0 && columns <= stride && len > 0);
    let rows = len.div_ceil(stride);
    assert!(len >= (rows - 1) * stride + columns);
    rows
}

#[inline(always)]
fn pair<E: Element>(first: E, second: E) -> Pair {
    let bits = |element: E| Pair::from(half::bf16::narrow(element.widen()).to_bits());
    bits(first) | bits(second) << 16
}

struct PackRows<'a, E> {
    matrix: &'a [E],
    stride: usize,
    columns: usize,
    rows: usize,
    panel: &'a mut [PanelRow],
}

impl<E: Element> Kernel for PackRows<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (at, out) in self.panel.iter_mut().enumerate() {
            let row = |row: usize| &self.matrix[row * self.stride..][..self.columns];
            let first = row(2 * at);
            match 2 * at + 1 < self.rows {
                true => interleave(first, row(2 * at + 1), out),
                false => interleave(first, &[E::narrow(0.0); PANEL][..self.columns], out),
            }
        }
    }
}

/// Pairs of two rows' elements; zeros where they end.
#[inline(always)]
fn interleave<E: Element, const N: usize>(first: &[E], second: &[E], out: &mut [Pair; N]) {
    match (first.first_chunk::<N>(), second.first_chunk::<N>()) {
        (Some(first), Some(second)) => {
            for at in 0..N {
                out[at] = pair(first[at], second[at]);
            }
        }
        _ => {
            out.fill(0);
            for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
                *out = pair(*first, *second);
            }
        }
    }
}

/// Rows and columns of a square that is transposed at a time.
const SQUARE: usize = 16;

type Square = [[Pair; SQUARE]; SQUARE];

struct PackColumns<'a, E> {
    matrix: &'a [E],
    stride: usize,
    columns: usize,
    depth: usize,
    panel: &'a mut [PanelRow],
}

impl<E: Element> Kernel for PackColumns<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        // A few columns to their end, and then the next: the processor reads so many rows ahead.
        for first in (0..PANEL).step_by(SQUARE) {
            for (at, rows) in self.panel.chunks_mut(SQUARE).enumerate() {
                let start = at * 2 * SQUARE;
                let depth = (self.depth - start).min(2 * SQUARE);
                let mut square = [[0; SQUARE]; SQUARE];
                for (column, pairs) in (first..self.columns).zip(&mut square) {
                    pair_up(&self.matrix[column * self.stride + start..][..depth], pairs);
                }
                transpose_square::<I>(&mut square);
                for (row, pairs) in rows.iter_mut().zip(&square) {
                    put(pairs, &mut row[first..first + SQUARE]);
                }
            }
        }
    }
}

/// Pairs of a row's neighbours; zeros where it ends.
#[inline(always)]
fn pair_up<E: Element>(row: &[E], out: &mut [Pair; SQUARE]) {
    match row.as_chunks::<2>() {
        (pairs, []) if pairs.len() == SQUARE => {
            for at in 0..SQUARE {
                out[at] = pair(pairs[at][0], pairs[at][1]);
            }
        }
        (pairs, rest) => {
            for (out, [first, second]) in out.iter_mut().zip(pairs) {
                *out = pair(*first, *second);
            }
            if let [last] = rest {
                out[pairs.len()] = pair(*last, E::narrow(0.0));
            }
        }
    }
}

struct Transpose<'a, E> {
    matrix: &'a [E],
    stride: usize,
    rows: usize,
    out: Window<'a, Pair>,
}

impl<E: Element> Kernel for Transpose<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let [columns, pairs] = self.out.shape();
        // Some rows after the other: in the order of columns each row would come from memory as often as it has squares.
        for start in (0..pairs).step_by(SQUARE) {
            let length = (pairs - start).min(SQUARE);
            for first in (0..columns).step_by(SQUARE) {
                let columns = (columns - first).min(SQUARE);
                let mut square = self.square(start, first, columns);
                transpose_square::<I>(&mut square);
                for (column, pairs) in (first..first + columns).zip(&square) {
                    put(pairs, &mut self.out.row(column)[start..start + length]);
                }
            }
        }
    }
}

impl<E: Element> Transpose<'_, E> {
    /// The pairs of some columns in the rows from `2 · start` on; zeros beyond the matrix.
    #[inline(always)]
    fn square(&self, start: usize, first: usize, columns: usize) -> Square {
        let zeros = [E::narrow(0.0); SQUARE];
        let row = |row: usize| match row < self.rows {
            true => &self.matrix[row * self.stride + first..][..columns],
            false => &zeros[..columns],
        };
        let mut square = [[0; SQUARE]; SQUARE];
        for (at, pairs) in square.iter_mut().enumerate() {
            interleave(row(2 * (start + at)), row(2 * (start + at) + 1), pairs);
        }
        square
    }
}

/// Copies as many as there is room for: a vector, where it is all.
#[inline(always)]
fn put(pairs: &[Pair; SQUARE], out: &mut [Pair]) {
    match out.first_chunk_mut::<SQUARE>() {
        Some(out) => *out = *pairs,
        None => out.copy_from_slice(&pairs[..out.len()]),
    }
}

#[inline(always)]
fn transpose_square<I: Isa>(square: &mut Square) {
    #[cfg(target_arch = "x86_64")]
    if I::AVX512.is_some() {
        // SAFETY: the code in hand is compiled for AVX-512.
        return unsafe { transpose_square_avx512(square) };
    }
    let rows = *square;
    for (column, row) in square.iter_mut().enumerate() {
        *row = rows.map(|row| row[column]);
    }
}

/// Rows are merged in four rounds: single elements, pairs of these, and then whole lanes of 128 bits.
///
/// # Safety
/// The CPU must have AVX-512F.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_square_avx512(square: &mut Square) {
    use std::arch::x86_64::*;
    let mut rows = [_mm512_setzero_si512(); SQUARE];
    for (vector, row) in rows.iter_mut().zip(&*square) {
        // SAFETY: a row is 512 bits, and any bits are a vector; so below.
        *vector = unsafe { _mm512_loadu_si512(row.as_ptr().cast()) };
    }
    let mut twos = rows;
    for at in (0..SQUARE).step_by(2) {
        twos[at] = _mm512_unpacklo_epi32(rows[at], rows[at + 1]);
        twos[at + 1] = _mm512_unpackhi_epi32(rows[at], rows[at + 1]);
    }
    let mut fours = twos;
    for at in (0..SQUARE).step_by(4) {
        for low in 0..2 {
            fours[at + 2 * low] = _mm512_unpacklo_epi64(twos[at + low], twos[at + 2 + low]);
            fours[at + 2 * low + 1] = _mm512_unpackhi_epi64(twos[at + low], twos[at + 2 + low]);
        }
    }
    // Now lane `l` of `fours[4·q + c]` has column `4·l + c` of rows `4·q..4·q + 4`.
    for column in 0..4 {
        let (a, b, c, d) = (fours[column], fours[4 + column], fours[8 + column], fours[12 + column]);
        let (even_ab, odd_ab) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_cd, odd_cd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        let lanes = [
            _mm512_shuffle_i32x4::<0x88>(even_ab, even_cd),
            _mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd),
            _mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd),
            _mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd),
        ];
        for lane in 0..4 {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(square[4 * lane + column].as_mut_ptr().cast(), lanes[lane]) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::numbers;
    use super::*;
    use half::bf16;
    use hvd_kernels::simd::{Level, dispatch_at};

    /// The element of a matrix, zero beyond it.
    fn bits(matrix: &[f32], stride: usize, rows: usize, columns: usize, row: usize, column: usize) -> Pair {
        match row < rows && column < columns {
            true => bf16::from_f32(matrix[row * stride + column]).to_bits().into(),
            false => 0,
        }
    }

    /// Runs `check` for matrices of many shapes, each in f32 and in bf16, at every level.
    fn for_shapes(shapes: &[(usize, usize)], check: impl Fn(Level, &[f32], &[bf16], usize, usize, usize)) {
        for &(rows, columns) in shapes {
            let stride = columns + 3;
            let matrix = &numbers(rows * stride)[..(rows - 1) * stride + columns];
            let narrow: Vec<bf16> = matrix.iter().map(|&value| bf16::from_f32(value)).collect();
            Level::available().for_each(|level| check(level, matrix, &narrow, stride, rows, columns));
        }
    }

    const SHAPES: [(usize, usize); 7] = [(1, 1), (2, 64), (5, 17), (33, 16), (64, 40), (7, 3), (64, 64)];

    #[test]
    fn a_panel_of_rows_has_pairs_of_rows() {
        for_shapes(&SHAPES, |level, matrix, narrow, stride, rows, columns| {
            let [mut wide, mut panel] = [(); 2].map(|()| vec![[9; PANEL]; rows.div_ceil(2)]);
            dispatch_at(level, PackRows { matrix, stride, columns, rows, panel: &mut wide });
            dispatch_at(level, PackRows { matrix: narrow, stride, columns, rows, panel: &mut panel });
            assert_eq!(wide, panel);
            for (at, row) in panel.iter().enumerate() {
                for (column, pair) in row.iter().enumerate() {
                    let half = |row| bits(matrix, stride, rows, columns, row, column);
                    assert_eq!(*pair, half(2 * at) | half(2 * at + 1) << 16, "{rows} {columns} {level:?}");
                }
            }
        });
    }

    #[test]
    fn a_panel_of_columns_has_pairs_of_neighbours() {
        for_shapes(&SHAPES, |level, matrix, narrow, stride, columns, depth| {
            let [mut wide, mut panel] = [(); 2].map(|()| vec![[9; PANEL]; depth.div_ceil(2)]);
            dispatch_at(level, PackColumns { matrix, stride, columns, depth, panel: &mut wide });
            dispatch_at(level, PackColumns { matrix: narrow, stride, columns, depth, panel: &mut panel });
            assert_eq!(wide, panel);
            for (at, row) in panel.iter().enumerate() {
                for (column, pair) in row.iter().enumerate() {
                    let half = |place| bits(matrix, stride, columns, depth, column, place);
                    assert_eq!(*pair, half(2 * at) | half(2 * at + 1) << 16, "{columns} {depth} {level:?}");
                }
            }
        });
    }

    #[test]
    fn the_transposed_has_columns_for_rows() {
        for_shapes(&SHAPES, |level, matrix, narrow, stride, rows, columns| {
            let pairs = rows.div_ceil(2) + 5;
            let [mut wide, mut out] = [(); 2].map(|()| vec![9; columns * pairs]);
            dispatch_at(level, Transpose { matrix, stride, rows, out: Window::of(&mut wide, pairs) });
            dispatch_at(level, Transpose { matrix: narrow, stride, rows, out: Window::of(&mut out, pairs) });
            assert_eq!(wide, out);
            for (column, row) in out.chunks(pairs).enumerate() {
                for (at, pair) in row.iter().enumerate() {
                    let half = |row| bits(matrix, stride, rows, columns, row, column);
                    assert_eq!(*pair, half(2 * at) | half(2 * at + 1) << 16, "{rows} {columns} {level:?}");
                }
            }
        });
    }
}
