//! Products of matrices, block by block.

use std::ops::Range;

use half::bf16;
use hvd_torch::{block, share_tasks};
use lm_kernels::{PANEL, Pair, PanelRow};
use tch::{Device, Kind, Tensor};

use super::super::holds;
use super::super::span::Span;

/// Rows of a block: with its part of the left matrix they stay in a processor's second cache.
const ROWS: usize = 256;

/// The depth that is summed over at once.
const DEPTH: usize = 1024;

/// Rows that are turned or packed at a time: as many as the processor reads ahead of at once.
const STRIP: usize = 32;

/// Tasks that there should be for each thread, at least.
const TASKS: usize = 4;

/// Panels that a part of the left matrix is read for.
const PANELS: usize = 4;

/// As many, where that part is too large for the cache.
const PANELS_OF_DEEP: usize = 12;

/// The depth from which on it is.
const DEEP: usize = 4 * DEPTH;

/// The left matrix of a product, row by row.
pub(super) struct Left {
    elements: Span<bf16>,
    rows: usize,
    depth: usize,
}

impl Left {
    /// The rows of the last dimension; a zero is added to each where they have an odd number of elements.
    pub(super) fn rows(matrix: &Tensor) -> hvd_torch::Result<Left> {
        let rows = matrix.numel() / last_dimension(matrix);
        let even = match last_dimension(matrix) % 2 {
            0 => matrix.shallow_clone(),
            _ => matrix.f_constant_pad_nd([0, 1])?,
        };
        let depth = last_dimension(&even);
        Ok(Left { elements: Span::of(&even), rows, depth })
    }

    /// Some rows of some of the depth.
    ///
    /// # Safety
    /// Nobody writes to them while they are borrowed.
    unsafe fn part(&self, rows: Range<usize>, depth: &Range<usize>) -> Rows<'_> {
        let range = rows.start * self.depth + depth.start..(rows.end - 1) * self.depth + depth.end;
        // SAFETY: the caller's promise.
        Rows { elements: unsafe { self.elements.read(range) }, stride: self.depth }
    }
}

fn last_dimension(matrix: &Tensor) -> usize {
    matrix.size().last().map_or(1, |length| *length as usize)
}

/// The right matrix of a product, in panels.
pub(super) struct Panels {
    pairs: Span<Pair>,
    depth: usize,
    columns: usize,
}

impl Panels {
    /// Of a matrix (depth, columns) of f32.
    pub(super) fn of_rows(matrix: &Tensor) -> hvd_torch::Result<Panels> {
        let columns = last_dimension(matrix);
        let (depth, from) = (matrix.numel() / columns, Span::<f32>::of(matrix));
        let panels = Panels::empty(depth, columns)?;
        // Each thread takes whole rows, which it reads as they lie.
        share_tasks(depth.div_ceil(STRIP), &|strips| {
            for start in strips.map(|strip| strip * STRIP) {
                let end = depth.min(start + STRIP);
                for panel in 0..panels.count() {
                    let part = panels.columns_of(panel);
                    // SAFETY: the matrix is only read, and each strip of a panel is written by one thread.
                    unsafe {
                        let given = from.read(start * columns + part.start..(end - 1) * columns + part.end);
                        lm_kernels::pack_rows(given, columns, part.len(), panels.rows_of(panel, &(start..end)));
                    }
                }
            }
        })?;
        Ok(panels)
    }

    /// Of the transposed of a matrix (columns, depth) of f32.
    pub(super) fn of_columns(matrix: &Tensor) -> hvd_torch::Result<Panels> {
        let depth = last_dimension(matrix);
        let (columns, from) = (matrix.numel() / depth, Span::<f32>::of(matrix));
        let panels = Panels::empty(depth, columns)?;
        share_tasks(panels.count(), &|tasks| {
            for panel in tasks {
                let part = panels.columns_of(panel);
                // SAFETY: the matrix is only read, and each panel is written by one thread.
                unsafe {
                    let given = from.read(part.start * depth..part.end * depth);
                    lm_kernels::pack_columns(given, depth, depth, panels.rows_of(panel, &(0..panels.depth)));
                }
            }
        })?;
        Ok(panels)
    }

    fn empty(depth: usize, columns: usize) -> hvd_torch::Result<Panels> {
        let rows = columns.div_ceil(PANEL) * depth.div_ceil(2);
        let pairs = Span::of(&Tensor::f_empty([rows as i64, PANEL as i64], (Kind::Int, Device::Cpu))?);
        Ok(Panels { pairs, depth: depth.next_multiple_of(2), columns })
    }

    fn columns_of(&self, panel: usize) -> Range<usize> {
        panel * PANEL..self.columns.min((panel + 1) * PANEL)
    }

    /// Where the panel's rows of some of the depth lie among all panels'.
    fn place(&self, panel: usize, depth: &Range<usize>) -> Range<usize> {
        let start = panel * self.depth / 2;
        (start + depth.start / 2) * PANEL..(start + depth.end.div_ceil(2)) * PANEL
    }

    /// Some of a panel's depth, to write to.
    ///
    /// # Safety
    /// Nobody else uses it while it is borrowed.
    #[allow(clippy::mut_from_ref)] // the threads of a loop share the panels and write to parts of their own
    unsafe fn rows_of(&self, panel: usize, depth: &Range<usize>) -> &mut [PanelRow] {
        // SAFETY: the caller's promise.
        unsafe { self.pairs.write(self.place(panel, depth)) }.as_chunks_mut().0
    }

    fn count(&self) -> usize {
        self.columns.div_ceil(PANEL)
    }

    /// Some of a panel's depth.
    ///
    /// # Safety
    /// Nobody writes to it while it is borrowed.
    unsafe fn part(&self, panel: usize, depth: &Range<usize>) -> &[PanelRow] {
        // SAFETY: the caller's promise.
        unsafe { self.pairs.read(self.place(panel, depth)) }.as_chunks().0
    }
}

/// A block of the result.
pub(super) struct Block<'a> {
    /// Its rows, each of [`PANEL`] sums, of which the first are those of its columns.
    pub(super) sums: &'a [f32],
    row: usize,
    column: usize,
    columns: usize,
}

impl Block<'_> {
    /// Its rows in the result.
    pub(super) fn rows(&self) -> Range<usize> {
        self.row..self.row + self.sums.len() / PANEL
    }

    /// Its columns in the result.
    pub(super) fn columns(&self) -> Range<usize> {
        self.column..self.column + self.columns
    }
}

/// Hands each block of `left · right` to `finish`, on several threads. The order in which an element is summed depends on the depth alone.
///
/// # Panics
/// If the left matrix is not as wide as the right one is high.
pub(super) fn product(left: &Left, right: &Panels, finish: &(dyn Fn(&Block) + Sync)) -> hvd_torch::Result<()> {
    assert_eq!(left.depth, right.depth, "matrices that do not fit");
    let most = if left.depth > DEEP { PANELS_OF_DEEP } else { PANELS };
    let blocks = left.rows.div_ceil(ROWS);
    let group = most.min(blocks * right.count() / (TASKS * tch::get_num_threads().max(1) as usize)).max(1);
    let groups = right.count().div_ceil(group);
    share_tasks(blocks * groups, &|tasks| {
        let mut sums = vec![0.0; group * ROWS * PANEL];
        on_this_thread(|| {
            for task in tasks {
                let (row, first) = (task / groups * ROWS, task % groups * group);
                let rows = ROWS.min(left.rows - row);
                let panels = first..right.count().min(first + group);
                for depth in (0..left.depth).step_by(DEPTH) {
                    let depths = depth..left.depth.min(depth + DEPTH);
                    for (panel, sums) in panels.clone().zip(sums.chunks_mut(ROWS * PANEL)) {
                        // SAFETY: both matrices are only read while they are borrowed.
                        let (left, panel) =
                            unsafe { (left.part(row..row + rows, &depths), right.part(panel, &depths)) };
                        multiply(left, panel, sums, PANEL, depth > 0);
                    }
                }
                for (panel, sums) in panels.zip(sums.chunks(ROWS * PANEL)) {
                    let Range { start: column, end } = right.columns_of(panel);
                    finish(&Block { sums: &sums[..rows * PANEL], row, column, columns: end - column });
                }
            }
        });
    })
}

/// Rows of a matrix, `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// From the first one's first element to the last one's last, or to what lies between rows.
    pub(super) elements: &'a [bf16],
    pub(super) stride: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn count(self) -> usize {
        self.elements.len().div_ceil(self.stride)
    }

    /// Some of them.
    pub(super) fn some(self, rows: Range<usize>) -> Rows<'a> {
        let end = self.elements.len().min(rows.end * self.stride);
        Rows { elements: &self.elements[rows.start * self.stride..end], ..self }
    }
}

/// `sums = left · panel`, or adds that, where rows of sums are `stride` apart; between [`on_this_thread`]'s brackets.
pub(super) fn multiply(left: Rows, panel: &[PanelRow], sums: &mut [f32], stride: usize, adds: bool) {
    let depth = 2 * panel.len();
    let rows = left.count();
    assert!(rows > 0 && depth <= left.stride && left.elements.len() >= (rows - 1) * left.stride + depth);
    assert!(stride >= PANEL && sums.len() >= (rows - 1) * stride + PANEL);
    let shape = block::Shape { rows, columns: PANEL, depth, strides: [left.stride, PANEL, stride] };
    let (from, to) = (left.elements.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the operands are as large as was just checked, and borrowed, as are the sums.
    done(unsafe { block::product(shape, from, panel.as_ptr().cast(), to, adds) });
}

/// `sum += factor · leftᵀ · right` in f32, where the rows of the left matrix are `columns` of `stride` elements.
pub(super) fn add_transposed(
    sum: &Tensor,
    factor: f32,
    left: &Tensor,
    [columns, stride]: [usize; 2],
    right: &Tensor,
) -> hvd_torch::Result<()> {
    if !holds::<f32>(sum) {
        let apart = Tensor::f_zeros(sum.size(), (Kind::Float, Device::Cpu))?;
        add_transposed(&apart, factor, left, [columns, stride], right)?;
        let _ = sum.shallow_clone().f_add_(&apart)?;
        return Ok(());
    }
    let width = last_dimension(right);
    let depth = right.numel() / width;
    let (to, left, right) = (Span::<f32>::of(sum), Span::<bf16>::of(left), Span::<bf16>::of(right));
    let shape = block::Shape { rows: columns, columns: width, depth, strides: [stride, width, width] };
    // SAFETY: `place` checks that the matrices are as large as the shape says; the sum is the caller's to write.
    unsafe {
        let (left, right) = (left.place(0, depth, columns, stride), right.place(0, depth, width, width));
        block::add_transposed(shape, factor, left, right, to.place(0, columns, width, width))
    }
}

/// Runs a loop that multiplies, and gives back what its products hold of the processor, also where it panics.
pub(super) fn on_this_thread(run: impl FnOnce()) {
    struct Release;
    impl Drop for Release {
        fn drop(&mut self) {
            let _ = block::release(); // what is served has no errors
        }
    }
    let _release = Release;
    run();
}

/// What is served has no errors; should there be one, the loop around it ends with it.
fn done(result: hvd_torch::Result<()>) {
    if let Err(error) = result {
        panic!("a product of bf16: {error}");
    }
}
