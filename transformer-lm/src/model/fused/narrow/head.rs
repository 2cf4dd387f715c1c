//! The head's loss, with logits and their gradients in bf16.

use half::bf16;
use hvd_torch::autograd::{Onto, differentiate, wanted};
use lm_kernels::{Element, Loss, Target};
use tch::{Device, Kind, Tensor};

use super::super::head::{HeadLoss, HeadOptions, add_scaled, count_correct, judge, total};
use super::super::linear::Weight;
use super::super::span::{Held, Span};
use super::product::{Left, Panels, product};
use super::transposed::add_transposed;
use crate::{Error, Result};

/// The most elements of the logits that exist at a time: 128 MiB.
const LOGITS: usize = 64 << 20;

/// As [`super::super::linear_cross_entropy`], of hidden states in bf16. Where no gradient is wanted the logits are not rounded.
pub(in super::super) fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    options: HeadOptions,
) -> Result<HeadLoss> {
    match wanted([hidden, weight]) {
        true => with_gradient(hidden, weight, targets, options),
        false => {
            let mut head = Head::new::<f32>(hidden, weight, targets.len(), options)?;
            for (start, targets) in head.pieces(targets) {
                drop(head.judge::<f32>(start, targets, false)?);
            }
            head.result()
        }
    }
}

fn with_gradient(hidden: &Tensor, weight: &Tensor, targets: &[Target], options: HeadOptions) -> Result<HeadLoss> {
    let mut head = Head::new::<bf16>(hidden, weight, targets.len(), options)?;
    let kept = Weight::of(weight);
    let of_hidden = Tensor::f_empty(hidden.size(), (Kind::Float, Device::Cpu))?;
    let mut earlier: Option<Tensor> = None;
    let mut last: Option<Piece> = None;
    let turned = Panels::of_rows(&kept.values)?;
    for (start, targets) in head.pieces(targets) {
        if let Some(piece) = last.take() {
            let (sum, onto) = match earlier {
                Some(sum) => (sum, Onto::Gradient),
                None => (kept.values.f_empty_like()?, Onto::Nothing),
            };
            piece.add_weight_gradient(&sum, onto, 1.0)?;
            earlier = Some(sum);
        }
        let logits = head.judge::<bf16>(start, targets, true)?;
        let (to, width) = (Span::<f32>::of(&of_hidden), of_hidden.size()[1] as usize);
        product(&Left::rows(&logits)?, &turned, &|block| {
            let rows = block.rows().start + start..block.rows().end + start;
            // SAFETY: each block of the result is written once, and `product` waits for what is streamed; so below.
            unsafe { lm_kernels::store(block.sums, None, to.result(rows, block.columns(), width)) };
        })?;
        last = Some(Piece { logits, hidden: head.hidden.f_narrow(0, start as i64, targets.len() as i64)? });
    }
    let last = last.ok_or_else(|| Error::Config("a head's loss of no rows".into()))?;
    let result = head.result()?;
    let backward = move |grads: &[Tensor]| {
        let factor = grads[0].double_value(&[]);
        let of_weight = kept.gradient(|sum, mut onto| {
            if let Some(earlier) = &earlier {
                add_scaled(&sum, onto, factor, earlier)?;
                onto = Onto::Gradient;
            }
            last.add_weight_gradient(&sum, onto, factor)
        })?;
        Ok(vec![of_hidden.f_mul_scalar(factor)?.f_to_kind(Kind::BFloat16)?, of_weight])
    };
    differentiate(&[hidden, weight], std::slice::from_ref(&result.loss), backward)?;
    Ok(result)
}

/// Some rows.
struct Piece {
    /// The gradients of the logits, as wide as a pair allows.
    logits: Tensor,
    /// The hidden states.
    hidden: Tensor,
}

impl Piece {
    /// `sum = factor · logitsᵀ · hidden`, or adds that: what is added in one go needs no memory of the weight's size.
    fn add_weight_gradient(&self, sum: &Tensor, onto: Onto, factor: f64) -> hvd_torch::Result<()> {
        let stride = self.logits.size()[1] as usize;
        add_transposed((sum, onto), factor as f32, &self.logits, [sum.size()[0] as usize, stride], &self.hidden)
    }
}

struct Head {
    /// (N, D)
    hidden: Tensor,
    /// The weights, (vocabulary, D), for logits.
    weight: Panels,
    vocabulary: usize,
    options: HeadOptions,
    /// Rows that are judged at a time.
    rows: usize,
    /// Each row's, (N).
    losses: Tensor,
    correct: i64,
}

impl Head {
    fn new<E: Held>(hidden: &Tensor, weight: &Tensor, targets: usize, options: HeadOptions) -> Result<Head> {
        let vocabulary = weight.size()[0] as usize;
        let most = (LOGITS * size_of::<bf16>() / size_of::<E>() / vocabulary).max(1);
        Ok(Head {
            hidden: hidden.detach(),
            weight: Panels::of_columns(&weight.detach())?,
            vocabulary,
            options,
            rows: targets.div_ceil(targets.div_ceil(most)),
            losses: Tensor::f_zeros([targets as i64], (Kind::Float, Device::Cpu))?,
            correct: 0,
        })
    }

    /// The first row and the targets of each piece.
    fn pieces<'a>(&self, targets: &'a [Target]) -> impl Iterator<Item = (usize, &'a [Target])> + use<'a> {
        let rows = self.rows;
        targets.chunks(rows).enumerate().map(move |(index, targets)| (index * rows, targets))
    }

    /// Takes the losses of some rows; gives their logits, or the gradients of these.
    fn judge<E: Element + Held>(&mut self, start: usize, targets: &[Target], gradient: bool) -> Result<Tensor> {
        let (rows, columns) = (targets.len(), self.vocabulary);
        let stride = columns.next_multiple_of(2);
        let hidden = self.hidden.f_narrow(0, start as i64, rows as i64)?;
        let logits = Tensor::f_empty([rows as i64, stride as i64], (E::KIND, Device::Cpu))?;
        if stride > columns {
            let _ = logits.f_narrow(1, columns as i64, 1)?.f_zero_()?;
        }
        let to = Span::<E>::of(&logits);
        product(&Left::rows(&hidden)?, &self.weight, &|block| {
            // SAFETY: each block of the logits is written once.
            unsafe { lm_kernels::store(block.sums, None, to.result(block.rows(), block.columns(), stride)) };
        })?;
        if self.options.count_correct {
            self.correct += count_correct(&logits.f_narrow(1, 0, columns as i64)?, targets)?;
        }
        let loss = Loss { smoothing: self.options.smoothing as f32, gradient };
        judge::<E>(&logits, columns, targets, loss, (&self.losses, start))?;
        Ok(logits)
    }

    fn result(&self) -> Result<HeadLoss> {
        Ok(HeadLoss { loss: total(&self.losses)?, correct: self.options.count_correct.then_some(self.correct) })
    }
}
