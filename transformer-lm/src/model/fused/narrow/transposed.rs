//! The gradients of weights: products with a transposed matrix, that sum over all rows of both.

use std::ops::Range;

use half::bf16;
use hvd_torch::autograd::Onto;
use hvd_torch::num_threads;
use lm_kernels::{Lines, Multiplier, PANEL, Pair, PanelRow, View, Window};
use tch::{Device, Kind, Tensor};

use super::super::holds;
use super::super::span::Span;
use super::product::{DEPTH, STRIP, Sums, depths, last_dimension, share_products};

/// The most rows of a block of the sum. It is turned as often as blocks lie beside each other, and its panels are packed as often as blocks
/// lie one above the other: a large one pays, and these just stay in a processor's second cache with what they are made of.
const ROWS: usize = 384;

/// The most panels of a block.
const PANELS: usize = 6;

/// Tasks that there should be for each thread, at least: few, as each packs its operands again.
const TASKS: usize = 2;

/// `sum = factor · leftᵀ · right` in f32, or adds that, where the rows of the left matrix are `columns` of `stride` elements.
pub(super) fn add_transposed(
    (sum, onto): (&Tensor, Onto),
    factor: f32,
    left: &Tensor,
    [columns, stride]: [usize; 2],
    right: &Tensor,
) -> hvd_torch::Result<()> {
    if !holds::<f32>(sum) {
        let apart = Tensor::f_empty(sum.size(), (Kind::Float, Device::Cpu))?;
        add_transposed((&apart, Onto::Nothing), factor, left, [columns, stride], right)?;
        return onto.add(sum, &apart);
    }
    let width = last_dimension(right);
    let depth = right.numel() / width;
    assert!(
        sum.numel() == columns * width && left.numel() == depth * stride && columns <= stride,
        "matrices that do not fit"
    );
    let cut = Cut::of(columns, width);
    let (to, left, right) = (Span::<f32>::of(sum), Span::<bf16>::of(left), Span::<bf16>::of(right));
    share_products(cut.tasks(), &|tasks, multiplier| {
        let mut scratch = Scratch::of(&cut);
        for (rows, columns) in tasks.map(|task| cut.block(task)) {
            // SAFETY: both matrices are only read.
            let parts = |depths: Range<usize>| unsafe {
                let left = left.view(depths.clone(), rows.clone(), stride);
                [left, right.view(depths, columns.clone(), width)]
            };
            let mut all = depths(depth).peekable();
            while let Some(depths) = all.next() {
                let (adds, is_last) = (depths.start > 0, depths.end == depth);
                multiplier.forget();
                if let Some(next) = all.peek() {
                    parts(next.clone()).into_iter().for_each(|part| multiplier.ask_for(part));
                }
                scratch.multiply(multiplier, parts(depths), adds, |panel, strip, sums| {
                    if is_last {
                        let rows = rows.start + strip.start..rows.start + strip.end;
                        let first = columns.start + panel * PANEL;
                        let columns = first..columns.end.min(first + PANEL);
                        // SAFETY: each block of the sum is written by one thread, and `share_products` waits for what is streamed.
                        unsafe {
                            match onto {
                                Onto::Nothing => lm_kernels::scale(sums, factor, to.result(rows, columns, width)),
                                Onto::Gradient => lm_kernels::accumulate(sums, factor, to.window(rows, columns, width)),
                            }
                        }
                    }
                });
            }
        }
    })
}

/// How a sum is cut into blocks.
struct Cut {
    height: usize,
    width: usize,
    /// Of a block.
    rows: usize,
    /// Of a block.
    panels: usize,
}

impl Cut {
    fn of(height: usize, width: usize) -> Cut {
        let panels = evenly(width.div_ceil(PANEL), PANELS);
        let beside = width.div_ceil(panels * PANEL);
        let strips = evenly(height.div_ceil(STRIP), ROWS / STRIP);
        let wanted = (TASKS * num_threads()).div_ceil(beside);
        Cut { height, width, rows: STRIP * strips.min(height.div_ceil(STRIP).div_ceil(wanted)), panels }
    }

    fn tasks(&self) -> usize {
        self.height.div_ceil(self.rows) * self.beside()
    }

    fn beside(&self) -> usize {
        self.width.div_ceil(self.panels * PANEL)
    }

    /// The rows and columns of a task's block.
    fn block(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let part = |at: usize, size: usize, end: usize| at * size..end.min((at + 1) * size);
        let (row, column) = (task / self.beside(), task % self.beside());
        (part(row, self.rows, self.height), part(column, self.panels * PANEL, self.width))
    }
}

/// The size of parts, of at most `most` each, that as few as possible of make up `count`.
fn evenly(count: usize, most: usize) -> usize {
    count.div_ceil(count.div_ceil(most))
}

/// What a thread computes a block in.
struct Scratch {
    sums: Sums,
    /// The left matrix's part, turned.
    turned: Lines<Pair>,
    /// The right one's.
    packed: Lines<PanelRow>,
}

impl Scratch {
    fn of(cut: &Cut) -> Scratch {
        let pairs = DEPTH / 2;
        Scratch {
            sums: Sums::of(cut.rows, cut.panels),
            turned: Lines::any(cut.rows * pairs),
            packed: Lines::any(cut.panels * pairs),
        }
    }

    /// `sums = leftᵀ · right`, or adds that; then `done` as in [`Sums::multiply`].
    fn multiply(
        &mut self,
        multiplier: &mut Multiplier,
        [left, right]: [View<bf16>; 2],
        adds: bool,
        done: impl FnMut(usize, Range<usize>, &[f32]),
    ) {
        let ([depth, rows], [_, columns]) = (left.shape(), right.shape());
        let (pairs, panels) = (depth.div_ceil(2), columns.div_ceil(PANEL));
        let (turned, packed) = (&mut self.turned[..rows * pairs], &mut self.packed[..panels * pairs]);
        lm_kernels::transpose(left, Window::of(turned, pairs));
        lm_kernels::pack_rows(right, Window::of(packed, pairs));
        let (turned, packed) = (View::of(bytemuck::cast_slice(turned), 2 * pairs), &*packed);
        self.sums.multiply(multiplier, turned, panels, &|at| &packed[at * pairs..][..pairs], adds, done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_a_sum_once() {
        for (height, width) in [(1, 1), (31, 65), (384, 1536), (1536, 384), (1000, 385), (50257, 768)] {
            let cut = Cut::of(height, width);
            let mut covered = vec![0u8; height * width];
            for (rows, columns) in (0..cut.tasks()).map(|task| cut.block(task)) {
                assert!(!rows.is_empty() && rows.len() <= cut.rows.min(ROWS));
                assert!(!columns.is_empty() && columns.len().div_ceil(PANEL) <= PANELS);
                rows.for_each(|row| columns.clone().for_each(|column| covered[row * width + column] += 1));
            }
            assert!(covered.into_iter().all(|times| times == 1), "{height} {width}");
        }
    }
}
