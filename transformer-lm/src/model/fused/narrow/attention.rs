//! Causal attention in bf16. Scores and weights are in f32 until they go into a product.

use std::ops::Range;

use half::bf16;
use hvd_torch::share_tasks;
use lm_kernels::{Mask, PANEL, Pair, PanelRow, Window};
use tch::Tensor;

use super::super::attention::{Head, Shape};
use super::super::span::Span;
use super::product::{Rows, multiply, on_this_thread};

/// Queries whose scores are computed at a time: as many as a panel has columns.
const BLOCK: usize = PANEL;

/// Rows of a panel with a block's depth.
const BLOCK_PAIRS: usize = BLOCK / 2;

/// Writes the results (B, T, D) and the logarithm of each row's sum (B, H, T) of queries, keys and values (B, T, 3·D).
pub(in super::super) fn forward(
    shape: &Shape,
    qkv: &Tensor,
    out: &Tensor,
    log_sums: &Tensor,
    masks: Option<&[Mask]>,
) -> hvd_torch::Result<()> {
    let (qkv, out, log_sums) = (Span::<bf16>::of(qkv), Span::<bf16>::of(out), Span::<f32>::of(log_sums));
    share_tasks(shape.b * shape.heads, &|heads| {
        let room = Room::of(shape);
        let (mut keys, mut values) = (room.by_key(), room.by_width());
        let (mut scores, mut weights, mut sums) =
            (room.scores(), vec![bf16::ZERO; BLOCK * room.keys], room.sums(BLOCK));
        on_this_thread(|| {
            for head in heads.map(|index| shape.head(index)) {
                // SAFETY: queries, keys and values are only read.
                let [q, k, v] = [0, 1, 2].map(|which| unsafe { part(shape, &qkv, &head, which) });
                room.pack_by_key(k, &mut keys);
                room.pack_by_width(v, &mut values);
                for (from, to, seen) in room.blocks() {
                    let scores = &mut scores[..(to - from) * seen];
                    room.scores_of(q.some(from..to), &keys, seen, scores);
                    // SAFETY: a head's sums are written by one thread.
                    let sums_of_rows = unsafe { log_sums.write(head.row + from..head.row + to) };
                    lm_kernels::causal_softmax(scores, seen, from, shape.scale(), sums_of_rows);
                    if let Some(mask) = shape.mask(masks, &head, from) {
                        lm_kernels::drop_weights(scores, seen, from, mask);
                    }
                    lm_kernels::convert(scores, &mut weights[..scores.len()]);
                    let weights = Rows { elements: &weights[..scores.len()], stride: seen };
                    room.gather(weights, &values, seen, &mut sums);
                    // SAFETY: a head's results are written by one thread.
                    unsafe { room.store(&sums, &out, head.at(from..to), head.column, shape.d) };
                }
            }
        });
    })
}

/// The gradient of the queries, keys and values, of which `saved` are these, the results and the sums.
pub(in super::super) fn backward(
    shape: &Shape,
    saved: [&Tensor; 3],
    grad: &Tensor,
    masks: Option<&[Mask]>,
) -> hvd_torch::Result<Tensor> {
    let (grad, result) = (grad.f_contiguous()?, saved[0].f_empty_like()?);
    let pass = Pass {
        shape,
        qkv: Span::of(saved[0]),
        out: Span::of(saved[1]),
        log_sums: Span::of(saved[2]),
        grad: Span::of(&grad),
        into: Span::of(&result),
        masks,
    };
    share_tasks(shape.b * shape.heads, &|heads| {
        let mut scratch = Scratch::of(Room::of(shape));
        on_this_thread(|| heads.for_each(|head| scratch.backward(&pass, &shape.head(head))));
    })?;
    Ok(result)
}

/// What a backward pass reads and writes.
struct Pass<'a> {
    shape: &'a Shape,
    qkv: Span<bf16>,
    out: Span<bf16>,
    log_sums: Span<f32>,
    /// The gradient of the results.
    grad: Span<bf16>,
    /// That of queries, keys and values.
    into: Span<bf16>,
    masks: Option<&'a [Mask]>,
}

/// What a thread computes a head's gradients in.
struct Scratch {
    room: Room,
    /// Keys and values, by key; keys by width.
    keys: Vec<PanelRow>,
    values: Vec<PanelRow>,
    turned_keys: Vec<PanelRow>,
    /// Of a block of queries: its weights, and their gradients.
    weights: Vec<f32>,
    grads: Vec<f32>,
    /// The same for products: rounded, and turned.
    narrow: Vec<bf16>,
    turned: Vec<Pair>,
    /// The block's queries, or the gradients of its results.
    block: Vec<PanelRow>,
    /// The gradients of its queries; of the head's keys and values.
    of_queries: Vec<f32>,
    of_keys: Vec<f32>,
    of_values: Vec<f32>,
}

impl Scratch {
    fn of(room: Room) -> Scratch {
        Scratch {
            keys: room.by_key(),
            values: room.by_key(),
            turned_keys: room.by_width(),
            weights: room.scores(),
            grads: room.scores(),
            narrow: vec![bf16::ZERO; BLOCK * room.keys],
            turned: vec![0; BLOCK_PAIRS * room.keys],
            block: vec![[0; PANEL]; BLOCK_PAIRS * room.panels],
            of_queries: room.sums(BLOCK),
            of_keys: room.sums(room.keys),
            of_values: room.sums(room.keys),
            room,
        }
    }

    /// The gradients of a head's queries, keys and values.
    fn backward(&mut self, pass: &Pass, head: &Head) {
        // SAFETY: keys and values are only read.
        let [k, v] = [1, 2].map(|which| unsafe { part(pass.shape, &pass.qkv, head, which) });
        self.room.pack_by_key(k, &mut self.keys);
        self.room.pack_by_key(v, &mut self.values);
        self.room.pack_by_width(k, &mut self.turned_keys);
        // The last block first: it sees all keys, whose gradients it thereby begins.
        for (from, to, seen) in self.room.blocks().rev() {
            self.block(pass, head, from..to, seen);
        }
        for (which, sums) in [(1, &self.of_keys), (2, &self.of_values)] {
            // SAFETY: a head's gradients are written by one thread.
            unsafe {
                let column = head.column + which * pass.shape.d;
                self.room.store(sums, &pass.into, head.at(0..pass.shape.t), column, 3 * pass.shape.d);
            }
        }
    }

    /// The gradients of a block of queries, and what it adds to those of the keys and values that it sees.
    fn block(&mut self, pass: &Pass, head: &Head, rows: Range<usize>, seen: usize) {
        let (shape, count, adds) = (pass.shape, rows.len() * seen, rows.end < pass.shape.t);
        // SAFETY: queries and the results' gradients are only read.
        let (q, outside) = unsafe { (part(shape, &pass.qkv, head, 0), result_of(shape, &pass.grad, head)) };
        let (q, outside) = (q.some(rows.clone()), outside.some(rows.clone()));
        self.differentiate(pass, head, rows.clone(), seen);

        let (weights, grads) = (&self.weights[..count], &self.grads[..count]);
        let narrow = &mut self.narrow[..count];
        lm_kernels::convert(grads, narrow);
        self.room.gather(Rows { elements: narrow, stride: seen }, &self.turned_keys, seen, &mut self.of_queries);
        // SAFETY: a head's gradients are written by one thread.
        unsafe { self.room.store(&self.of_queries, &pass.into, head.at(rows), head.column, 3 * shape.d) };
        let turned = &mut self.turned[..BLOCK_PAIRS * seen];
        for (given, other, into) in [(grads, q, &mut self.of_keys), (weights, outside, &mut self.of_values)] {
            lm_kernels::transpose(given, seen, Window::of(turned, BLOCK_PAIRS));
            self.room.pack_block(other, &mut self.block);
            self.room.spread(turned, &self.block, seen, into, adds);
        }
    }

    /// Has the weights of a block of queries, and the gradients of its scores.
    fn differentiate(&mut self, pass: &Pass, head: &Head, rows: Range<usize>, seen: usize) {
        let (shape, count, places) = (pass.shape, rows.len() * seen, head.row + rows.start..head.row + rows.end);
        // SAFETY: all of these are only read.
        let (q, [out, outside], log_sums) = unsafe {
            let results = [&pass.out, &pass.grad].map(|span| result_of(shape, span, head).some(rows.clone()));
            (part(shape, &pass.qkv, head, 0).some(rows.clone()), results, pass.log_sums.read(places))
        };
        let (weights, grads) = (&mut self.weights[..count], &mut self.grads[..count]);
        self.room.scores_of(q, &self.keys, seen, weights);
        lm_kernels::causal_weights(weights, seen, rows.start, shape.scale(), log_sums);
        self.room.scores_of(outside, &self.values, seen, grads);
        let mut dots = [0.0; BLOCK];
        let dots = &mut dots[..rows.len()];
        lm_kernels::row_dots(out.elements, outside.elements, [shape.width(), shape.d], dots);
        let mask = shape.mask(pass.masks, head, rows.start);
        lm_kernels::causal_softmax_backward(weights, grads, seen, rows.start, dots, shape.scale(), mask);
    }
}

/// The queries (0), keys (1) or values (2) of a head.
///
/// # Safety
/// Nobody writes to them.
unsafe fn part<'a>(shape: &Shape, qkv: &'a Span<bf16>, head: &Head, which: usize) -> Rows<'a> {
    let (start, stride) = (head.qkv + which * shape.d, 3 * shape.d);
    // SAFETY: the caller's promise.
    let elements = unsafe { qkv.read(start..start + (shape.t - 1) * stride + shape.width()) };
    Rows { elements, stride }
}

/// The rows of a head of the results, or of their gradients.
///
/// # Safety
/// Nobody writes to them.
unsafe fn result_of<'a>(shape: &Shape, span: &'a Span<bf16>, head: &Head) -> Rows<'a> {
    // SAFETY: the caller's promise.
    let elements = unsafe { span.read(head.out..head.out + (shape.t - 1) * shape.d + shape.width()) };
    Rows { elements, stride: shape.d }
}

/// The sizes of a head, and what follows from them.
struct Room {
    /// Positions.
    t: usize,
    /// As many, and then to a whole number of panels.
    keys: usize,
    /// Width of a head.
    width: usize,
    /// Panels that have its columns.
    panels: usize,
}

impl Room {
    fn of(shape: &Shape) -> Room {
        let width = shape.width();
        Room { t: shape.t, keys: shape.t.next_multiple_of(PANEL), width, panels: width.div_ceil(PANEL) }
    }

    /// First and last row of each block of queries, and how many keys it is computed with.
    fn blocks(&self) -> impl DoubleEndedIterator<Item = (usize, usize, usize)> + use<> {
        let t = self.t;
        (0..t.div_ceil(BLOCK)).map(move |at| (at * BLOCK, t.min((at + 1) * BLOCK), (at + 1) * BLOCK))
    }

    /// For panels that have a column for each key, as deep as a head is wide.
    fn by_key(&self) -> Vec<PanelRow> {
        vec![[0; PANEL]; self.keys / PANEL * self.width / 2]
    }

    /// For panels that have the head's columns, and a depth of all keys.
    fn by_width(&self) -> Vec<PanelRow> {
        vec![[0; PANEL]; self.panels * self.keys / 2]
    }

    /// For a block's scores.
    fn scores(&self) -> Vec<f32> {
        vec![0.0; BLOCK * self.keys]
    }

    /// For sums of so many rows: those of the first panel's columns, then those of the next.
    fn sums(&self, rows: usize) -> Vec<f32> {
        vec![0.0; self.panels * rows * PANEL]
    }

    fn pack_by_key(&self, matrix: Rows, panels: &mut [PanelRow]) {
        for (at, panel) in panels.chunks_exact_mut(self.width / 2).enumerate() {
            let keys = at * PANEL..self.t.min((at + 1) * PANEL);
            lm_kernels::pack_columns(matrix.some(keys).elements, matrix.stride, self.width, panel);
        }
    }

    fn pack_by_width(&self, matrix: Rows, panels: &mut [PanelRow]) {
        for (at, panel) in panels.chunks_exact_mut(self.keys / 2).enumerate() {
            let first = at * PANEL;
            let columns = PANEL.min(self.width - first);
            lm_kernels::pack_rows(&matrix.elements[first..], matrix.stride, columns, &mut panel[..self.t.div_ceil(2)]);
        }
    }

    /// As [`Room::pack_by_width`], of a block's rows; zeros follow the last.
    fn pack_block(&self, matrix: Rows, panels: &mut [PanelRow]) {
        let rows = matrix.count();
        let block = Room { t: rows, keys: BLOCK, ..*self };
        panels.iter_mut().for_each(|row| row.fill(0));
        block.pack_by_width(matrix, panels);
    }

    /// `scores (rows, seen) = left · panelsᵀ`
    fn scores_of(&self, left: Rows, panels: &[PanelRow], seen: usize, scores: &mut [f32]) {
        for (at, panel) in panels.chunks_exact(self.width / 2).take(seen / PANEL).enumerate() {
            multiply(left, panel, &mut scores[at * PANEL..], seen, false);
        }
    }

    /// `sums (rows, width) = weights (rows, seen) · panels`
    fn gather(&self, weights: Rows, panels: &[PanelRow], seen: usize, sums: &mut [f32]) {
        let share = sums.len() / self.panels;
        for (panel, sums) in panels.chunks_exact(self.keys / 2).zip(sums.chunks_exact_mut(share)) {
            multiply(weights, &panel[..seen / 2], sums, PANEL, false);
        }
    }

    /// `sums (seen, width) = turned (seen, block) · block`, or adds that.
    fn spread(&self, turned: &[Pair], block: &[PanelRow], seen: usize, sums: &mut [f32], adds: bool) {
        let turned = Rows { elements: bytemuck::cast_slice(&turned[..seen * BLOCK_PAIRS]), stride: BLOCK };
        let share = sums.len() / self.panels;
        for (panel, sums) in block.chunks_exact(BLOCK_PAIRS).zip(sums.chunks_exact_mut(share)) {
            multiply(turned, panel, sums, PANEL, adds);
        }
    }

    /// Rounds rows of sums to some rows of a matrix that is `stride` wide, from a column on.
    ///
    /// # Safety
    /// Nobody else uses these.
    unsafe fn store(&self, sums: &[f32], out: &Span<bf16>, rows: Range<usize>, column: usize, stride: usize) {
        for (at, sums) in sums.chunks_exact(sums.len() / self.panels).enumerate() {
            let first = at * PANEL;
            let columns = column + first..column + self.width.min(first + PANEL);
            // SAFETY: the caller's promise.
            let out = unsafe { out.window(rows.clone(), columns, stride) };
            lm_kernels::store(&sums[..rows.len() * PANEL], None, out);
        }
    }
}
