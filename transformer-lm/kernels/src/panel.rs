//! How products of bf16 want their operands to lie: the processor multiplies pairs of neighbours and adds both products to a sum.
//!
//! The left matrix lies row by row, neighbours along the depth that is summed over. The right one lies in *panels* of [`PANEL`] columns:
//! a row of a panel has, for each column, the pair of elements of two rows of the matrix. What is missing of a panel is zero.

use super::fetch::fetch;
use super::{Element, View, Window};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// Columns of a panel.
pub const PANEL: usize = 64;

/// Two bf16 that follow each other along the depth, the first in the low half.
pub type Pair = u32;

/// A row of a panel.
pub type PanelRow = [Pair; PANEL];

/// The panels of a matrix, each a row of `panels`.
///
/// # Panics
/// If there are not as many as the matrix has columns for, or they are not half as high as it is; so below.
pub fn pack_rows<E: Element>(matrix: View<E>, panels: Window<PanelRow>) {
    let [rows, columns] = matrix.shape();
    assert_eq!(panels.shape(), [columns.div_ceil(PANEL), rows.div_ceil(2)]);
    dispatch(PackRows { matrix, panels });
}

/// A panel of the transposed of a matrix of at most [`PANEL`] rows.
pub fn pack_columns<E: Element>(matrix: View<E>, panel: &mut [PanelRow]) {
    let [columns, depth] = matrix.shape();
    assert!(columns <= PANEL && panel.len() == depth.div_ceil(2));
    dispatch(PackColumns { matrix, panel });
}

/// The transposed of a matrix, as the left one of a product: `out` has a row of pairs for each column, which ends with zeros.
pub fn transpose<E: Element>(matrix: View<E>, out: Window<Pair>) {
    let ([rows, columns], [height, pairs]) = (matrix.shape(), out.shape());
    assert!(columns == height && rows.div_ceil(2) <= pairs);
    dispatch(Transpose { matrix, out });
}

#[inline(always)]
fn pair<E: Element>(first: E, second: E) -> Pair {
    let bits = |element: E| Pair::from(element.round().to_bits());
    bits(first) | bits(second) << 16
}

struct PackRows<'a, E> {
    matrix: View<'a, E>,
    panels: Window<'a, PanelRow>,
}

impl<E: Element> Kernel for PackRows<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let ([rows, columns], [panels, pairs]) = (self.matrix.shape(), self.panels.shape());
        let zeros = [E::narrow(0.0); PANEL];
        // Two rows to their end, and then the next: in the order of panels each row would come from memory as often as there are panels.
        for at in 0..pairs {
            let first = self.matrix.row(2 * at);
            let second = (2 * at + 1 < rows).then(|| self.matrix.row(2 * at + 1));
            for row in 2 * at + 4..rows.min(2 * at + 6) {
                fetch(self.matrix.row(row).as_ptr(), columns);
            }
            for panel in 0..panels {
                let part = |row: &'_ [E]| panel * PANEL..row.len().min((panel + 1) * PANEL);
                let (first, columns) = (&first[part(first)], part(first));
                let second = second.map_or(&zeros[..columns.len()], |second| &second[columns]);
                interleave(first, second, &mut self.panels.row(panel)[at]);
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

/// Elements after a square's that are asked for where many rows are read side by side.
const AHEAD: usize = 4 * SQUARE;

struct PackColumns<'a, E> {
    matrix: View<'a, E>,
    panel: &'a mut [PanelRow],
}

impl<E: Element> Kernel for PackColumns<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let [columns, depth] = self.matrix.shape();
        // A few columns to their end, and then the next: the processor reads so many rows ahead.
        for first in (0..PANEL).step_by(SQUARE) {
            for (at, rows) in self.panel.chunks_mut(SQUARE).enumerate() {
                let start = at * 2 * SQUARE;
                let depth = (depth - start).min(2 * SQUARE);
                let mut square = [[0; SQUARE]; SQUARE];
                for (column, pairs) in (first..columns).zip(&mut square) {
                    pair_up(&self.matrix.row(column)[start..start + depth], pairs);
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
    matrix: View<'a, E>,
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
        let (zeros, [rows, _]) = ([E::narrow(0.0); SQUARE], self.matrix.shape());
        let row = |row: usize| match row < rows {
            true => &self.matrix.row(row)[first..first + columns],
            false => &zeros[..columns],
        };
        let mut square = [[0; SQUARE]; SQUARE];
        for (at, pairs) in square.iter_mut().enumerate() {
            let (above, below) = (row(2 * (start + at)), row(2 * (start + at) + 1));
            for row in [above, below] {
                fetch(row.as_ptr().wrapping_add(AHEAD), SQUARE);
            }
            interleave(above, below, pairs);
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
    fn for_shapes(shapes: &[(usize, usize)], check: impl Fn(Level, &[f32], View<f32>, View<bf16>, usize)) {
        for &(rows, columns) in shapes {
            let stride = columns + 3;
            let wide = &numbers(rows * stride)[..];
            let narrow: Vec<bf16> = wide.iter().map(|&value| bf16::from_f32(value)).collect();
            let (of_wide, of_narrow) = (View::of(wide, stride), View::of(&narrow, stride));
            let (of_wide, of_narrow) = (of_wide.columns(0..columns), of_narrow.columns(0..columns));
            Level::available().for_each(|level| check(level, wide, of_wide, of_narrow, stride));
        }
    }

    const SHAPES: [(usize, usize); 7] = [(1, 1), (2, 64), (5, 17), (33, 16), (64, 40), (7, 3), (64, 64)];

    #[test]
    fn panels_have_pairs_of_rows() {
        let wider = [(5, 65), (8, 200), (1, 128)];
        for_shapes(&[&SHAPES[..], &wider].concat(), |level, matrix, given, narrow, stride| {
            let [rows, columns] = given.shape();
            let pairs = rows.div_ceil(2);
            let [mut wide, mut panels] = [(); 2].map(|()| vec![[9; PANEL]; columns.div_ceil(PANEL) * pairs]);
            dispatch_at(level, PackRows { matrix: given, panels: Window::of(&mut wide, pairs) });
            dispatch_at(level, PackRows { matrix: narrow, panels: Window::of(&mut panels, pairs) });
            assert_eq!(wide, panels);
            for (index, row) in panels.iter().enumerate() {
                let (panel, at) = (index / pairs, index % pairs);
                for (column, pair) in row.iter().enumerate() {
                    let half = |row| bits(matrix, stride, rows, columns, row, panel * PANEL + column);
                    assert_eq!(*pair, half(2 * at) | half(2 * at + 1) << 16, "{rows} {columns} {level:?}");
                }
            }
        });
    }

    #[test]
    fn a_panel_of_columns_has_pairs_of_neighbours() {
        for_shapes(&SHAPES, |level, matrix, given, narrow, stride| {
            let [columns, depth] = given.shape();
            let [mut wide, mut panel] = [(); 2].map(|()| vec![[9; PANEL]; depth.div_ceil(2)]);
            dispatch_at(level, PackColumns { matrix: given, panel: &mut wide });
            dispatch_at(level, PackColumns { matrix: narrow, panel: &mut panel });
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
        for_shapes(&SHAPES, |level, matrix, given, narrow, stride| {
            let [rows, columns] = given.shape();
            let pairs = rows.div_ceil(2) + 5;
            let [mut wide, mut out] = [(); 2].map(|()| vec![9; columns * pairs]);
            dispatch_at(level, Transpose { matrix: given, out: Window::of(&mut wide, pairs) });
            dispatch_at(level, Transpose { matrix: narrow, out: Window::of(&mut out, pairs) });
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
