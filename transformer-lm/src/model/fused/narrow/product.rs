//! Products of matrices, block by block.

use std::ops::Range;

use half::bf16;
use hvd_torch::{Tasks, num_threads, share_tasks};
use lm_kernels::{Lines, Multiplier, PANEL, Pair, PanelRow, View, Window};
use tch::{Device, Kind, Tensor};

use super::super::span::Span;

/// Rows of a block: with its part of the left matrix, its panels and those that come next they stay in a processor's second cache.
const ROWS: usize = 256;

/// Panels of a block.
const PANELS: usize = 4;

/// The depth that is summed over at once: so much of a strip stays in the first cache while the panels come by.
pub(super) const DEPTH: usize = 256;

/// The depth up to which a block's rows of the left matrix stay in the second cache while all panels come by.
const KEPT: usize = 1024;

/// Rows that are multiplied or packed at a time.
pub(super) const STRIP: usize = 32;

/// Tasks that there should be for each thread, at least.
const TASKS: usize = 4;

/// The parts of a depth that are summed over one after the other.
pub(super) fn depths(depth: usize) -> impl Iterator<Item = Range<usize>> {
    (0..depth).step_by(DEPTH).map(move |start| start..depth.min(start + DEPTH))
}

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
    unsafe fn part(&self, rows: Range<usize>, depth: Range<usize>) -> View<'_, bf16> {
        // SAFETY: the caller's promise.
        unsafe { self.elements.view(rows, depth, self.depth) }
    }
}

pub(super) fn last_dimension(matrix: &Tensor) -> usize {
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
                let strip = start..depth.min(start + STRIP);
                // SAFETY: the matrix is only read, and each strip of the panels is written by one thread.
                unsafe {
                    let given = from.view(strip.clone(), 0..columns, columns);
                    lm_kernels::pack_rows(given, panels.window(0..panels.count(), &strip));
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
                    let given = from.view(part, 0..depth, depth);
                    let mut panel = panels.window(panel..panel + 1, &(0..panels.depth));
                    lm_kernels::pack_columns(given, panel.row(0));
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

    /// Some of the panels' depth, a row for each, to write to.
    ///
    /// # Safety
    /// Nobody else uses it while it is borrowed.
    unsafe fn window(&self, panels: Range<usize>, depth: &Range<usize>) -> Window<'_, PanelRow> {
        let (first, rows) = (self.place(panels.start, depth), depth.len().div_ceil(2));
        let part = self.pairs.place(first.start, panels.len(), rows * PANEL, self.depth / 2 * PANEL);
        // SAFETY: as was just checked it lies within the panels; the rest is the caller's promise.
        unsafe { Window::new(part.cast(), panels.len(), rows, self.depth / 2) }
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

/// What is multiplied at a time, while the next is asked for.
struct Part {
    rows: Range<usize>,
    panels: Range<usize>,
    depths: Range<usize>,
}

/// The parts of some rows of the result and some panels, in the order in which they are summed over.
fn parts(rows: Range<usize>, panels: Range<usize>, depth: usize) -> impl Iterator<Item = Part> {
    let groups = panels.clone().step_by(PANELS).map(move |first| first..panels.end.min(first + PANELS));
    groups.flat_map(move |panels| {
        let rows = rows.clone();
        depths(depth).map(move |depths| Part { rows: rows.clone(), panels: panels.clone(), depths })
    })
}

impl Part {
    fn ask_for(&self, left: &Left, right: &Panels, multiplier: &mut Multiplier) {
        for panel in self.panels.clone() {
            // SAFETY: both matrices are only read while they are borrowed.
            multiplier.ask_for(View::of(unsafe { right.part(panel, &self.depths) }, 1));
        }
        if left.depth > KEPT {
            // SAFETY: as above.
            multiplier.ask_for(unsafe { left.part(self.rows.clone(), self.depths.clone()) });
        }
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
    let blocks = left.rows.div_ceil(ROWS);
    let shares = (TASKS * num_threads()).div_ceil(blocks).min(right.count());
    share_products(blocks * shares, &|tasks, multiplier| {
        let mut sums = Sums::of(left.rows.min(ROWS), right.count().min(PANELS));
        for task in tasks {
            let (row, share) = (task / shares * ROWS, task % shares);
            let rows = row..left.rows.min(row + ROWS);
            let share = right.count() * share / shares..right.count() * (share + 1) / shares;
            let mut parts = parts(rows, share, left.depth).peekable();
            while let Some(part) = parts.next() {
                multiplier.forget();
                if let Some(next) = parts.peek() {
                    next.ask_for(left, right, multiplier);
                }
                sums.add(left, right, &part, multiplier, finish);
            }
        }
    })
}

/// The sums of a block: for each panel its rows of [`PANEL`].
pub(super) struct Sums {
    all: Lines<f32>,
    rows: usize,
}

impl Sums {
    /// Of so many rows and panels, at most.
    pub(super) fn of(rows: usize, panels: usize) -> Sums {
        Sums { all: Lines::any(rows * panels * PANEL), rows }
    }

    /// Sums over a part's depth, and hands the blocks to `finish` with the last of it.
    fn add(
        &mut self,
        left: &Left,
        right: &Panels,
        Part { rows, panels, depths }: &Part,
        multiplier: &mut Multiplier,
        finish: &(dyn Fn(&Block) + Sync),
    ) {
        let (adds, is_last) = (depths.start > 0, depths.end == left.depth);
        // SAFETY: both matrices are only read while they are borrowed.
        let part = unsafe { left.part(rows.clone(), depths.clone()) };
        // SAFETY: as above.
        let panel_at = |at: usize| unsafe { right.part(panels.start + at, depths) };
        self.multiply(multiplier, part, panels.len(), &panel_at, adds, |at, strip, sums| {
            if is_last {
                let Range { start: column, end } = right.columns_of(panels.start + at);
                finish(&Block { sums, row: rows.start + strip.start, column, columns: end - column });
            }
        });
    }

    /// `sums = left · panels`, or adds that, strip by strip; `done` then gets the panel, the strip's rows, and what is there of their sums.
    pub(super) fn multiply<'a>(
        &mut self,
        multiplier: &mut Multiplier,
        left: View<bf16>,
        panels: usize,
        panel_at: &dyn Fn(usize) -> &'a [PanelRow],
        adds: bool,
        mut done: impl FnMut(usize, Range<usize>, &[f32]),
    ) {
        let [rows, _] = left.shape();
        for start in (0..rows).step_by(STRIP) {
            let strip = start..rows.min(start + STRIP);
            for at in 0..panels {
                let first = at * self.rows;
                let sums = &mut self.all[(first + strip.start) * PANEL..(first + strip.end) * PANEL];
                multiplier.multiply(left.rows(strip.clone()), panel_at(at), &mut Window::of(sums, PANEL), adds);
                done(at, strip.clone(), sums);
            }
        }
    }
}

/// [`share_tasks`] with what multiplies on each thread. What is streamed to a [result](Span::result) is there when this returns.
pub(super) fn share_products(count: usize, body: &(dyn Fn(Tasks, &mut Multiplier) + Sync)) -> hvd_torch::Result<()> {
    /// Also where the body panics.
    struct FinishStreams;
    impl Drop for FinishStreams {
        fn drop(&mut self) {
            lm_kernels::finish_streams();
        }
    }
    share_tasks(count, &|tasks| {
        let _streams = FinishStreams;
        // SAFETY: what runs here are loops of ours, which call no library that multiplies.
        let multiplier = unsafe { Multiplier::best() };
        body(tasks, &mut multiplier.expect("products of bf16 are served where the processor has them"));
    })
}
