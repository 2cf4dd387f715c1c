//! Causal attention that reads queries, keys and values where they lie, computes no score of a key that is not seen (but within a
//! block), and keeps no weights: the backward pass computes them again from each row's sum (Dao et al., 2022, FlashAttention).

use std::ops::Range;

use half::bf16;
use hvd_torch::autograd::differentiate;
use hvd_torch::parallel_for;
use lm_kernels::Mask;
use tch::{Device, Kind, Tensor};

use super::span::{Matrix, Span};
use super::{has_bf16, holds, is_served, narrow};
use crate::model::{Dropout, causal_mask};
use crate::{Error, Result};

/// Who may look at whom.
#[derive(Debug)]
pub(in crate::model) enum Attend {
    /// Each position sees itself and those before it; nothing is cached.
    Causal,
    /// Every position sees all: a single new token and its past.
    All,
    /// True where a query (row) may see a key (column); broadcasts to (B, H, T, S).
    Masked(Tensor),
}

/// Queries whose scores are computed at a time.
const BLOCK: usize = 64;

/// Attention of `heads` heads in which each position sees itself and those before it: of the queries, keys and values beside each
/// other, (B, T, 3·D), the values that each position gathers, (B, T, D). Dropout is of the weights, (B, H, T, T).
///
/// # Errors
/// If the shape is another; if torch fails.
pub fn causal_attention(qkv: &Tensor, heads: usize, dropout: &Dropout) -> Result<Tensor> {
    let shape = Shape::of(qkv, heads)?;
    let narrow = serves_narrow(qkv, &shape);
    if !narrow && !is_served(qkv) {
        return split_attention(qkv, &shape, dropout);
    }
    let masks = dropout.masks_of(shape.b)?;
    let qkv_values = qkv.detach();
    let (b, t, d, h) = (shape.b as i64, shape.t as i64, shape.d as i64, heads as i64);
    let out = Tensor::f_empty([b, t, d], (qkv.kind(), qkv.device()))?;
    let log_sums = Tensor::f_empty([b, h, t], (Kind::Float, qkv.device()))?;
    match narrow {
        true => narrow::attention::forward(&shape, &qkv_values, &out, &log_sums, masks.as_deref())?,
        false => shape.forward(&qkv_values, &out, &log_sums, masks.as_deref())?,
    }
    // What backward keeps must not hold the result's node, which holds it.
    let out_values = out.detach();
    let out = [out];
    differentiate(&[qkv], &out, move |grads| {
        let saved = [&qkv_values, &out_values, &log_sums];
        Ok(vec![match narrow {
            true => narrow::attention::backward(&shape, saved, &grads[0], masks.as_deref())?,
            false => shape.backward(saved, &grads[0], masks.as_deref())?,
        }])
    })?;
    let [out] = out;
    Ok(out)
}

/// Whether the loops of bf16 serve it: their products want pairs.
fn serves_narrow(qkv: &Tensor, shape: &Shape) -> bool {
    has_bf16() && holds::<bf16>(qkv) && shape.width().is_multiple_of(2)
}

/// The same where these loops do not apply. 16 bits with dropout on the CPU do without torch's function, which would keep the weights.
fn split_attention(qkv: &Tensor, shape: &Shape, dropout: &Dropout) -> Result<Tensor> {
    let Shape { b, t, d, heads, .. } = *shape;
    let narrow = matches!(qkv.kind(), Kind::BFloat16 | Kind::Half);
    if narrow && qkv.device() == Device::Cpu && !dropout.is_off() {
        let wide = qkv.f_contiguous()?.f_to_kind(Kind::Float)?;
        return Ok(causal_attention(&wide, heads, dropout)?.f_to_kind(qkv.kind())?);
    }
    let size = [b as i64, t as i64, heads as i64, (d / heads) as i64];
    let parts = qkv.f_split(d as i64, 2)?;
    let part = |at: usize| parts[at].f_reshape(size)?.f_transpose(1, 2); // (B, H, T, hs)
    let y = attention([&part(0)?, &part(1)?, &part(2)?], &Attend::Causal, dropout)?;
    Ok(y.f_transpose(1, 2)?.f_reshape([b as i64, t as i64, d as i64])?)
}

/// What queries (B, H, T, hs) gather from keys and values (B, H, S, hs), by torch's functions.
pub(in crate::model) fn attention([q, k, v]: [&Tensor; 3], attend: &Attend, dropout: &Dropout) -> Result<Tensor> {
    if !dropout.is_off() && q.device() == Device::Cpu {
        return dropping_attention([q, k, v], attend, dropout);
    }
    let (mask, causal) = match attend {
        Attend::Causal => (None, true),
        Attend::All => (None, false),
        Attend::Masked(mask) => (Some(mask), false),
    };
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, mask, dropout.of_torch(), causal, None, false)?)
}

/// [`attention`] with our own masks of the weights.
fn dropping_attention([q, k, v]: [&Tensor; 3], attend: &Attend, dropout: &Dropout) -> Result<Tensor> {
    let scores = (q / (q.size()[3] as f64).sqrt()).f_matmul(&k.f_transpose(2, 3)?)?; // (B, H, T, S)
    let hide = |visible: &Tensor| scores.f_masked_fill(&visible.f_logical_not()?, f64::NEG_INFINITY);
    let scores = match attend {
        Attend::Causal => hide(&causal_mask(q.size()[2], k.size()[2], q.device()))?,
        Attend::All => scores,
        Attend::Masked(visible) => hide(visible)?,
    };
    let weights = scores.f_softmax(-1, None)?;
    Ok(dropout.apply(weights)?.f_matmul(v)?)
}

#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Sequences.
    pub(super) b: usize,
    /// Positions of a sequence.
    pub(super) t: usize,
    /// Width of the result.
    pub(super) d: usize,
    pub(super) heads: usize,
}

/// One head of one sequence.
pub(super) struct Head {
    /// Its first query's place in (B, T, 3·D), and in (B, T, D).
    pub(super) qkv: usize,
    pub(super) out: usize,
    /// Its first row's place in (B, H, T).
    pub(super) row: usize,
    /// The sequence's first row of B·T.
    position: usize,
    /// The head's first column of D.
    pub(super) column: usize,
}

impl Head {
    /// Some positions' rows of B·T.
    pub(super) fn at(&self, positions: Range<usize>) -> Range<usize> {
        self.position + positions.start..self.position + positions.end
    }
}

impl Shape {
    fn of(qkv: &Tensor, heads: usize) -> Result<Shape> {
        let size = qkv.size();
        let wrong = || {
            Error::Config(format!(
                "queries, keys and values of {size:?}; expected (B, T, 3·D), D a multiple of {heads}, T and 3·D below 2³¹"
            ))
        };
        let &[b, t, width] = &size[..] else { return Err(wrong()) };
        let fits_blas = t.max(width) <= i32::MAX.into();
        let (b, t, d) = (b as usize, t as usize, width as usize / 3);
        match fits_blas && heads > 0 && b * t * d > 0 && 3 * d == width as usize && d.is_multiple_of(heads) {
            true => Ok(Shape { b, t, d, heads }),
            false => Err(wrong()),
        }
    }

    pub(super) fn width(&self) -> usize {
        self.d / self.heads
    }

    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.width() as f32).sqrt()
    }

    pub(super) fn head(&self, index: usize) -> Head {
        let (sequence, head) = (index / self.heads, index % self.heads);
        let (position, column) = (sequence * self.t, head * self.width());
        let (qkv, out) = (position * 3 * self.d + column, position * self.d + column);
        Head { qkv, out, row: index * self.t, position, column }
    }

    /// Rows `from..to` of the queries (0), keys (1) or values (2) of a head.
    fn part(&self, qkv: &Span<f32>, head: &Head, which: usize, from: usize, to: usize) -> Matrix {
        let stride = 3 * self.d;
        qkv.matrix(head.qkv + which * self.d + from * stride, to - from, self.width(), stride)
    }

    /// Rows `from..to` of the results of a head.
    fn result(&self, out: &Span<f32>, head: &Head, from: usize, to: usize) -> Matrix {
        out.matrix(head.out + from * self.d, to - from, self.width(), self.d)
    }

    /// The mask of a block of weights, whose first row is that of this query.
    pub(super) fn mask(&self, masks: Option<&[Mask]>, head: &Head, query: usize) -> Option<Mask> {
        let rows = self.heads * self.t;
        masks.map(|masks| masks[head.row / rows].from_row(head.row % rows + query))
    }

    fn forward(&self, qkv: &Tensor, out: &Tensor, log_sums: &Tensor, masks: Option<&[Mask]>) -> hvd_torch::Result<()> {
        let (qkv, out, log_sums) = (Span::of(qkv), Span::of(out), Span::of(log_sums));
        parallel_for(self.b * self.heads, 1, &|range| {
            let mut scores = vec![0.0; BLOCK.min(self.t) * self.t];
            for head in range.map(|index| self.head(index)) {
                for from in (0..self.t).step_by(BLOCK) {
                    let to = self.t.min(from + BLOCK);
                    let block = &mut scores[..(to - from) * to];
                    let weights = Matrix::of(block, to);
                    // SAFETY: `qkv` is only read; a head's results and sums are written by one thread, as is its own block. The matrix is
                    // not used while the slice is.
                    unsafe {
                        let (q, k) = (self.part(&qkv, &head, 0, from, to), self.part(&qkv, &head, 1, 0, to));
                        weights.product(self.scale(), q, k.t(), 0.0);
                        let sums = log_sums.write(head.row + from..head.row + to);
                        lm_kernels::causal_softmax(block, to, from, 1.0, sums);
                        if let Some(mask) = self.mask(masks, &head, from) {
                            lm_kernels::drop_weights(block, to, from, mask);
                        }
                        let weights = Matrix::of(block, to);
                        self.result(&out, &head, from, to).product(1.0, weights, self.part(&qkv, &head, 2, 0, to), 0.0);
                    }
                }
            }
        })
    }

    /// The gradient of the queries, keys and values; `saved` are these, the results and the sums.
    fn backward(
        &self,
        [qkv, out, log_sums]: [&Tensor; 3],
        grad: &Tensor,
        masks: Option<&[Mask]>,
    ) -> hvd_torch::Result<Tensor> {
        let grad = grad.f_contiguous()?;
        let result = qkv.f_empty_like()?;
        let dots = self.dots(out, &grad)?; // (B, H, T)
        let (given, grad) = (Span::of(qkv), Span::of(&grad));
        let (into, log_sums, dots) = (Span::of(&result), Span::of(log_sums), Span::of(&dots));
        parallel_for(self.b * self.heads, 1, &|range| {
            let room = BLOCK.min(self.t) * self.t;
            let (mut weights, mut grads) = (vec![0.0; room], vec![0.0; room]);
            for head in range.map(|index| self.head(index)) {
                // The last block first: it sees all keys, whose gradients it thereby begins.
                for from in (0..self.t).step_by(BLOCK).rev() {
                    let to = self.t.min(from + BLOCK);
                    let (block, block_grads) = (&mut weights[..(to - from) * to], &mut grads[..(to - from) * to]);
                    let kept = if to == self.t { 0.0 } else { 1.0 };
                    // SAFETY: as in `forward`; a head's gradients are written by one thread.
                    unsafe {
                        let part = |which, from| self.part(&given, &head, which, from, to);
                        let grad_of = |which, from| self.part(&into, &head, which, from, to);
                        let (q, k, v) = (part(0, from), part(1, 0), part(2, 0));
                        let outside = self.result(&grad, &head, from, to);
                        let rows = head.row + from..head.row + to;
                        Matrix::of(block, to).product(self.scale(), q, k.t(), 0.0);
                        lm_kernels::causal_weights(block, to, from, 1.0, log_sums.read(rows.clone()));
                        Matrix::of(block_grads, to).product(1.0, outside, v.t(), 0.0);
                        lm_kernels::causal_softmax_backward(
                            block,
                            block_grads,
                            to,
                            from,
                            dots.read(rows),
                            self.scale(),
                            self.mask(masks, &head, from),
                        );
                        grad_of(2, 0).product(1.0, Matrix::of(block, to).t(), outside, kept);
                        let scores = Matrix::of(block_grads, to);
                        grad_of(0, from).product(1.0, scores, k, 0.0);
                        grad_of(1, 0).product(1.0, scores.t(), q, kept);
                    }
                }
            }
        })?;
        Ok(result)
    }

    /// Each row's product of result and gradient, (B, H, T), which is also that of its weights and their gradients.
    fn dots(&self, out: &Tensor, grad: &Tensor) -> hvd_torch::Result<Tensor> {
        let size = [self.b as i64, self.t as i64, self.heads as i64, self.width() as i64];
        let dots = out.f_mul(grad)?.f_view(&size[..])?.f_sum_dim_intlist(-1, false, Kind::Float)?; // (B, T, H)
        Ok(dots.f_transpose(1, 2)?.f_contiguous()?)
    }
}
