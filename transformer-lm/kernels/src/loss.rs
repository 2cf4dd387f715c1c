//! Cross-entropy of rows of logits, and its gradient in their place.

use super::exp::exp;
use super::{Element, fold, greatest};
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// What a row is to predict: a column; none for a row that is left out.
pub type Target = Option<usize>;

/// How the loss is taken.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// Share of the target's probability that is spread over all columns.
    pub smoothing: f32,
    /// Whether the gradients are wanted, or the logits may stay as they are.
    pub gradient: bool,
}

/// The losses of rows of `columns` logits in nats, to `losses`. Where the gradient is wanted each logit becomes its row's loss's gradient
/// with respect to it. A row that is left out has a loss of 0, and gradients of 0. Rows are `stride` logits apart; what lies between
/// them stays.
///
/// # Panics
/// If `logits` are not such a row for each target and loss, or a target is none of the columns.
pub fn cross_entropy<E: Element>(
    logits: &mut [E],
    [columns, stride]: [usize; 2],
    targets: &[Target],
    loss: Loss,
    losses: &mut [f32],
) {
    assert!(columns > 0 && columns <= stride && logits.len() == stride * targets.len());
    assert!(targets.len() == losses.len() && targets.iter().flatten().all(|&target| target < columns));
    for ((row, target), result) in logits.chunks_exact_mut(stride).zip(targets).zip(losses) {
        let row = &mut row[..columns];
        match *target {
            Some(target) => dispatch(Row { row, target, loss, result }),
            None => {
                *result = 0.0;
                if loss.gradient {
                    row.fill(E::narrow(0.0));
                }
            }
        }
    }
}

struct Row<'a, E> {
    row: &'a mut [E],
    target: usize,
    loss: Loss,
    result: &'a mut f32,
}

impl<E: Element> Kernel for Row<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Row { row, target, loss: Loss { smoothing, gradient }, result } = self;
        let highest = greatest(row);
        let exps = fold_wide(row, |logit| exp(logit - highest));
        let log_sum = f64::from(highest) + exps.ln();
        let mean = if smoothing > 0.0 { fold_wide(row, |logit| logit) / row.len() as f64 } else { 0.0 };
        let smoothing = f64::from(smoothing);
        *result = (log_sum - (1.0 - smoothing) * f64::from(row[target].widen()) - smoothing * mean) as f32;
        if gradient {
            let share = (1.0 / exps) as f32;
            let spread = (smoothing / row.len() as f64) as f32;
            let of_target = exp(row[target].widen() - highest) * share - spread - (1.0 - smoothing) as f32;
            for logit in row.iter_mut() {
                *logit = E::narrow(exp(logit.widen() - highest) * share - spread);
            }
            row[target] = E::narrow(of_target);
        }
    }
}

/// The sum of `f` over a row: in f32 over pieces, in f64 over these.
#[inline(always)]
fn fold_wide<E: Element>(row: &[E], f: impl Fn(f32) -> f32 + Copy) -> f64 {
    const PIECE: usize = 1024;
    row.chunks(PIECE).map(|piece| f64::from(fold(piece, 0.0, f, |a, b| a + b))).sum()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_levels, numbers};
    use super::*;
    use hvd_kernels::simd::dispatch_at;

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let loss = Loss { smoothing: 0.1, gradient: true };
        check_levels(|level| {
            let (mut row, mut result) = (numbers(2003), 0.0);
            dispatch_at(level, Row { row: &mut row, target: 7, loss, result: &mut result });
            row.push(result);
            row
        });
    }
}
