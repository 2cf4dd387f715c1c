//! The loss of a language model's head, without its logits: some rows' logits at a time become a loss and the gradients of the hidden
//! states and of the weights, and are forgotten (Hsu et al., 2024, Liger kernel).

use hvd_torch::autograd::{Onto, differentiate, wanted};
use hvd_torch::parallel_for;
use lm_kernels::{Element, Loss, Target};
use tch::{Kind, Tensor};

use super::linear::{Weight, add_matrices};
use super::span::{Held, Span};
use super::{is_quick, narrow};
use crate::{Error, Result};

/// The most elements of the logits that exist at a time: 128 MiB. With fewer rows the gradient of the weights, which every piece is
/// added to, would take more time to read and write than to compute.
const LOGITS: usize = 32 << 20;

/// Elements that are worth a thread.
const GRAIN: usize = 1 << 14;

/// What the loss is of.
#[derive(Clone, Copy, Debug)]
pub struct HeadOptions {
    /// Share of a target's probability that is spread over the whole vocabulary.
    pub smoothing: f64,
    /// A target that is left out.
    pub ignore_index: i64,
    /// Asks for [`HeadLoss::correct`].
    pub count_correct: bool,
}

/// What [`linear_cross_entropy`] gives.
#[derive(Debug)]
pub struct HeadLoss {
    /// The sum of the rows' losses in nats, a scalar.
    pub loss: Tensor,
    /// How many rows find their target likeliest, if it was asked for. In bf16 and with gradients, logits that round to the same are equal: the first of
    /// them is taken for the likeliest.
    pub correct: Option<i64>,
}

/// The summed cross-entropy of `hidden · weightᵀ`, (N, D) by (vocabulary, D), against `targets` (N), int64. None where it is not served.
///
/// # Errors
/// A target that is not in the vocabulary, shapes that do not fit; if torch fails.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    options: HeadOptions,
) -> Result<Option<HeadLoss>> {
    if !is_quick(hidden, weight) {
        return Ok(None);
    }
    let (&[rows, width], &[vocabulary, same]) = (&hidden.size()[..], &weight.size()[..]) else {
        return Err(misfit(hidden, weight, targets));
    };
    if width != same || targets.size() != [rows] || targets.kind() != Kind::Int64 {
        return Err(misfit(hidden, weight, targets));
    }
    let targets = read_targets(targets, vocabulary, options.ignore_index)?;
    if hidden.kind() == Kind::BFloat16 {
        return narrow::linear_cross_entropy(hidden, weight, &targets, options).map(Some);
    }
    let wanted = wanted([hidden, weight]);
    let pieces = targets.len().div_ceil((LOGITS / vocabulary as usize).max(1));
    let rows = targets.len().div_ceil(pieces);
    let mut head = Head::new(hidden.detach(), weight.detach(), rows, options, wanted)?;
    for (index, targets) in targets.chunks(rows).enumerate() {
        head.add((index * rows) as i64, targets)?;
    }
    let loss = total(&head.losses)?;
    if let Some(gradients) = head.gradients {
        let kept = Weight::of(weight);
        let backward = move |grads: &[Tensor]| {
            let factor = grads[0].double_value(&[]);
            let [of_hidden, of_weight] = &gradients;
            let of_weight = kept.gradient(|sum, onto| add_scaled(&sum, onto, factor, of_weight))?;
            Ok(vec![of_hidden.f_mul_scalar(factor)?, of_weight])
        };
        differentiate(&[hidden, weight], std::slice::from_ref(&loss), backward)?;
    }
    Ok(Some(HeadLoss { loss, correct: options.count_correct.then_some(head.correct) }))
}

/// `sum = factor · values`, or adds that.
pub(super) fn add_scaled(sum: &Tensor, onto: Onto, factor: f64, values: &Tensor) -> hvd_torch::Result<()> {
    if onto == Onto::Nothing {
        let _ = values.f_mul_scalar_out(sum, factor)?;
        return Ok(());
    }
    let (into, from) = (Span::of(sum), Span::of(values));
    parallel_for(sum.numel(), GRAIN, &|range| {
        // SAFETY: each range is written by one thread.
        unsafe { lm_kernels::add_scaled(from.read(range.clone()), factor as f32, into.write(range)) };
    })
}

fn misfit(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Error {
    Error::Config(format!("{hidden:?} against {targets:?} does not fit a head of {weight:?}"))
}

fn read_targets(targets: &Tensor, vocabulary: i64, ignore_index: i64) -> Result<Vec<Target>> {
    let read = |target: i64| match target {
        target if target == ignore_index => Ok(None),
        target if (0..vocabulary).contains(&target) => Ok(Some(target as usize)),
        other => Err(Error::Config(format!("the target {other} is not in a vocabulary of {vocabulary}"))),
    };
    Vec::<i64>::try_from(targets)?.into_iter().map(read).collect()
}

/// The rows that have been seen so far.
struct Head {
    /// (N, D)
    hidden: Tensor,
    /// (vocabulary, D)
    weight: Tensor,
    options: HeadOptions,
    /// Room for some rows' logits.
    logits: Tensor,
    /// Each row's, (N).
    losses: Tensor,
    correct: i64,
    /// Those of `hidden` and `weight`, where they are wanted.
    gradients: Option<[Tensor; 2]>,
}

impl Head {
    fn new(hidden: Tensor, weight: Tensor, rows: usize, options: HeadOptions, wanted: bool) -> Result<Head> {
        let floats = (Kind::Float, hidden.device());
        let logits = Tensor::f_empty([rows as i64, weight.size()[0]], floats)?;
        let losses = Tensor::f_zeros([hidden.size()[0]], floats)?;
        let gradients = if wanted { Some([hidden.f_empty_like()?, weight.f_empty_like()?]) } else { None };
        Ok(Head { hidden, weight, options, logits, losses, correct: 0, gradients })
    }

    /// Adds the rows from `start` on.
    fn add(&mut self, start: i64, targets: &[Target]) -> Result<()> {
        let rows = targets.len() as i64;
        let hidden = self.hidden.f_narrow(0, start, rows)?;
        let logits = self.logits.f_narrow(0, 0, rows)?; // (rows, vocabulary)
        add_matrices(&logits, Onto::Nothing, &hidden, &self.weight.f_tr()?)?;
        if self.options.count_correct {
            self.correct += count_correct(&logits, targets)?;
        }
        let loss = Loss { smoothing: self.options.smoothing as f32, gradient: self.gradients.is_some() };
        judge::<f32>(&logits, logits.size()[1] as usize, targets, loss, (&self.losses, start as usize))?;
        let Some([of_hidden, of_weight]) = &self.gradients else { return Ok(()) };
        add_matrices(&of_hidden.f_narrow(0, start, rows)?, Onto::Nothing, &logits, &self.weight)?;
        let onto = if start == 0 { Onto::Nothing } else { Onto::Gradient };
        Ok(add_matrices(of_weight, onto, &logits.f_tr()?, &hidden)?)
    }
}

/// The losses of some rows from `start` on, and where they are wanted the gradients of their logits in place of these; the rows of `logits` begin with
/// a logit for each of so many columns.
pub(super) fn judge<E: Element + Held>(
    logits: &Tensor,
    columns: usize,
    targets: &[Target],
    loss: Loss,
    (losses, start): (&Tensor, usize),
) -> Result<()> {
    let (stride, logits, losses) = (logits.size()[1] as usize, Span::<E>::of(logits), Span::of(losses));
    parallel_for(targets.len(), 1, &|range| {
        // SAFETY: a row and its loss are written by one thread.
        let (logits, losses) = unsafe {
            let losses = losses.write(start + range.start..start + range.end);
            (logits.write(range.start * stride..range.end * stride), losses)
        };
        lm_kernels::cross_entropy(logits, [columns, stride], &targets[range], loss, losses);
    })?;
    Ok(())
}

/// The sum of the rows' losses.
pub(super) fn total(losses: &Tensor) -> Result<Tensor> {
    Ok(losses.f_sum(Kind::Double)?.to_kind(Kind::Float))
}

pub(super) fn count_correct(logits: &Tensor, targets: &[Target]) -> Result<i64> {
    let likeliest = Vec::<i64>::try_from(logits.f_argmax(1, false)?)?;
    Ok(likeliest.iter().zip(targets).filter(|(found, target)| target.is_some_and(|t| t as i64 == **found)).count()
        as i64)
}
