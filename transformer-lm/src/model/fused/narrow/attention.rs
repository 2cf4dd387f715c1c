//! Causal attention in bf16. Scores and weights are in f32 until they go into a product.

use std::ops::Range;

use half::bf16;
use lm_kernels::{Lines, Mask, Multiplier, PANEL, Pair, PanelRow, View, Window};
use tch::Tensor;

use super::super::attention::{Head, Shape};
use super::super::span::Span;
use super::product::share_products;

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
    share_products(shape.b * shape.heads, &|heads, multiplier| {
        let room = Room::of(shape);
        let (mut keys, mut values) = (room.by_key(), room.by_width());
        let (mut scores, mut weights, mut sums) = (room.scores(), Lines::any(BLOCK * room.keys), room.sums(BLOCK));
        for head in heads.map(|index| shape.head(index)) {
            // SAFETY: queries, keys and values are only read.
            let [q, k, v] = [0, 1, 2].map(|which| unsafe { part(shape, &qkv, &head, which) });
            room.pack_by_key(k, &mut keys);
            room.pack_by_width(v, &mut values);
            for (from, to, seen) in room.blocks() {
                let scores = &mut scores[..(to - from) * seen];
                room.scores_of(multiplier, q.rows(from..to), &keys, seen, scores);
                // SAFETY: a head's sums are written by one thread.
                let sums_of_rows = unsafe { log_sums.write(head.row + from..head.row + to) };
                lm_kernels::causal_softmax(scores, seen, from, shape.scale(), sums_of_rows);
                if let Some(mask) = shape.mask(masks, &head, from) {
                    lm_kernels::drop_weights(scores, seen, from, mask);
                }
                let weights = &mut weights[..scores.len()];
                lm_kernels::convert(scores, weights);
                room.gather(multiplier, View::of(weights, seen), &values, &mut sums);
                // SAFETY: a head's results are written by one thread.
                unsafe { room.store(&sums, &out, head.at(from..to), head.column, shape.d) };
            }
        }
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
    share_products(shape.b * shape.heads, &|heads, multiplier| {
        let mut scratch = Scratch::of(Room::of(shape), multiplier);
        heads.for_each(|head| scratch.backward(&pass, &shape.head(head)));
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
struct Scratch<'a> {
    room: Room,
    multiplier: &'a mut Multiplier,
    /// Keys and values, by key; keys by width.
    keys: Lines<PanelRow>,
    values: Lines<PanelRow>,
    turned_keys: Lines<PanelRow>,
    /// Of a block of queries: its weights, and their gradients.
    weights: Lines<f32>,
    grads: Lines<f32>,
    /// The same for products: rounded, and turned.
    narrow: Lines<bf16>,
    turned: Lines<Pair>,
    /// The block's queries, or the gradients of its results.
    block: Lines<PanelRow>,
    /// The gradients of its queries; of the head's keys and values.
    of_queries: Lines<f32>,
    of_keys: Lines<f32>,
    of_values: Lines<f32>,
}

impl<'a> Scratch<'a> {
    fn of(room: Room, multiplier: &'a mut Multiplier) -> Self {
        Scratch {
            multiplier,
            keys: room.by_key(),
            values: room.by_key(),
            turned_keys: room.by_width(),
            weights: room.scores(),
            grads: room.scores(),
            narrow: Lines::any(BLOCK * room.keys),
            turned: Lines::any(BLOCK_PAIRS * room.keys),
            block: Lines::any(BLOCK_PAIRS * room.panels),
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
        let (q, outside) = (q.rows(rows.clone()), outside.rows(rows.clone()));
        self.differentiate(pass, head, rows.clone(), seen);

        let (weights, grads) = (&self.weights[..count], &self.grads[..count]);
        let narrow = &mut self.narrow[..count];
        lm_kernels::convert(grads, narrow);
        let narrow = View::of(narrow, seen);
        self.room.gather(self.multiplier, narrow, &self.turned_keys, &mut self.of_queries);
        // SAFETY: a head's gradients are written by one thread.
        unsafe { self.room.store(&self.of_queries, &pass.into, head.at(rows), head.column, 3 * shape.d) };
        let turned = &mut self.turned[..BLOCK_PAIRS * seen];
        for (given, other, into) in [(grads, q, &mut self.of_keys), (weights, outside, &mut self.of_values)] {
            lm_kernels::transpose(View::of(given, seen), Window::of(turned, BLOCK_PAIRS));
            self.room.pack_block(other, &mut self.block);
            self.room.spread(self.multiplier, turned, &self.block, into, adds);
        }
    }

    /// Has the weights of a block of queries, and the gradients of its scores.
    fn differentiate(&mut self, pass: &Pass, head: &Head, rows: Range<usize>, seen: usize) {
        let (shape, count, places) = (pass.shape, rows.len() * seen, head.row + rows.start..head.row + rows.end);
        // SAFETY: all of these are only read.
        let (q, [out, outside], log_sums) = unsafe {
            let results = [&pass.out, &pass.grad].map(|span| result_of(shape, span, head).rows(rows.clone()));
            (part(shape, &pass.qkv, head, 0).rows(rows.clone()), results, pass.log_sums.read(places))
        };
        let (weights, grads) = (&mut self.weights[..count], &mut self.grads[..count]);
        self.room.scores_of(self.multiplier, q, &self.keys, seen, weights);
        lm_kernels::causal_weights(weights, seen, rows.start, shape.scale(), log_sums);
        self.room.scores_of(self.multiplier, outside, &self.values, seen, grads);
        let mut dots = [0.0; BLOCK];
        let dots = &mut dots[..rows.len()];
        lm_kernels::row_dots(out, outside, dots);
        let mask = shape.mask(pass.masks, head, rows.start);
        lm_kernels::causal_softmax_backward(weights, grads, seen, rows.start, dots, shape.scale(), mask);
    }
}

/// The queries (0), keys (1) or values (2) of a head.
///
/// # Safety
/// Nobody writes to them.
unsafe fn part<'a>(shape: &Shape, qkv: &'a Span<bf16>, head: &Head, which: usize) -> View<'a, bf16> {
    let first = head.column + which * shape.d;
    // SAFETY: the caller's promise.
    unsafe { qkv.view(head.at(0..shape.t), first..first + shape.width(), 3 * shape.d) }
}

/// The rows of a head of the results, or of their gradients.
///
/// # Safety
/// Nobody writes to them.
unsafe fn result_of<'a>(shape: &Shape, span: &'a Span<bf16>, head: &Head) -> View<'a, bf16> {
    // SAFETY: the caller's promise.
    unsafe { span.view(head.at(0..shape.t), head.column..head.column + shape.width(), shape.d) }
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
    fn by_key(&self) -> Lines<PanelRow> {
        Lines::any(self.keys / PANEL * self.width / 2)
    }

    /// For panels that have the head's columns, and a depth of all keys.
    fn by_width(&self) -> Lines<PanelRow> {
        Lines::any(self.panels * self.keys / 2)
    }

    /// For a block's scores.
    fn scores(&self) -> Lines<f32> {
        Lines::any(BLOCK * self.keys)
    }

    /// For sums of so many rows: those of the first panel's columns, then those of the next.
    fn sums(&self, rows: usize) -> Lines<f32> {
        Lines::any(self.panels * rows * PANEL)
    }

    fn pack_by_key(&self, matrix: View<bf16>, panels: &mut [PanelRow]) {
        for (at, panel) in panels.chunks_exact_mut(self.width / 2).enumerate() {
            lm_kernels::pack_columns(matrix.rows(at * PANEL..self.t.min((at + 1) * PANEL)), panel);
        }
    }

    /// Zeros follow the last row.
    fn pack_by_width(&self, matrix: View<bf16>, panels: &mut [PanelRow]) {
        let pairs = self.t.div_ceil(2);
        for panel in panels.chunks_exact_mut(self.keys / 2) {
            panel[pairs..].as_flattened_mut().fill(0);
        }
        lm_kernels::pack_rows(matrix, Window::of(panels, self.keys / 2).columns(0..pairs));
    }

    /// As [`Room::pack_by_width`], of a block's rows.
    fn pack_block(&self, matrix: View<bf16>, panels: &mut [PanelRow]) {
        let [rows, _] = matrix.shape();
        let block = Room { t: rows, keys: BLOCK, ..*self };
        block.pack_by_width(matrix, panels);
    }

    /// `scores (rows, seen) = left · panelsᵀ`
    fn scores_of(
        &self,
        multiplier: &mut Multiplier,
        left: View<bf16>,
        panels: &[PanelRow],
        seen: usize,
        scores: &mut [f32],
    ) {
        for (at, panel) in panels.chunks_exact(self.width / 2).take(seen / PANEL).enumerate() {
            let mut scores = Window::of(scores, seen).columns(at * PANEL..(at + 1) * PANEL);
            multiplier.multiply(left, panel, &mut scores, false);
        }
    }

    /// `sums (rows, width) = weights (rows, seen) · panels`
    fn gather(&self, multiplier: &mut Multiplier, weights: View<bf16>, panels: &[PanelRow], sums: &mut [f32]) {
        let ([rows, seen], share) = (weights.shape(), sums.len() / self.panels);
        for (panel, sums) in panels.chunks_exact(self.keys / 2).zip(sums.chunks_exact_mut(share)) {
            let sums = &mut Window::of(&mut sums[..rows * PANEL], PANEL);
            multiplier.multiply(weights, &panel[..seen / 2], sums, false);
        }
    }

    /// `sums (seen, width) = turned (seen, block) · block`, or adds that.
    fn spread(&self, multiplier: &mut Multiplier, turned: &[Pair], block: &[PanelRow], sums: &mut [f32], adds: bool) {
        let turned = View::of(bytemuck::cast_slice(turned), BLOCK);
        let ([seen, _], share) = (turned.shape(), sums.len() / self.panels);
        for (panel, sums) in block.chunks_exact(BLOCK_PAIRS).zip(sums.chunks_exact_mut(share)) {
            multiplier.multiply(turned, panel, &mut Window::of(&mut sums[..seen * PANEL], PANEL), adds);
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
            // SAFETY: the caller's promise; `share_products` waits for what is streamed.
            let out = unsafe { out.result(rows.clone(), columns, stride) };
            lm_kernels::store(&sums[..rows.len() * PANEL], None, out);
        }
    }
}
