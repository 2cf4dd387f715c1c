//! Cross-entropy of rows of logits, and its gradient in their place.

use super::exp::exp;
use super::{fold, greatest};
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

/// The losses of rows of logits in nats, to `losses`. Where the gradient is wanted each logit becomes its row's loss's gradient with
/// respect to it. A row that is left out has a loss of 0, and gradients of 0.
///
/// # Panics
/// If `logits` are not a row of `columns` for each target and loss, or a target is none of the columns.
pub fn cross_entropy(logits: &mut [f32], columns: usize, targets: &[Target], loss: Loss, losses: &mut [f32]) {
    assert!(columns > 0 && logits.len() == columns * targets.len() && targets.len() == losses.len());
    assert!(targets.iter().flatten().all(|&target| target < columns));
    for ((row, target), result) in logits.chunks_exact_mut(columns).zip(targets).zip(losses) {
        match *target {
            Some(target) => dispatch(Row { row, target, loss, result }),
            None => {
                *result = 0.0;
                if loss.gradient {
                    row.fill(0.0);
                }
            }
        }
    }
}

struct Row<'a> {
    row: &'a mut [f32],
    target: usize,
    loss: Loss,
    result: &'a mut f32,
}

impl Kernel for Row<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Row { row, target, loss: Loss { smoothing, gradient }, result } = self;
        let highest = greatest(row);
        let exps = fold_wide(row, |logit| exp(logit - highest));
        let log_sum = f64::from(highest) + exps.ln();
        let mean = if smoothing > 0.0 { fold_wide(row, |logit| logit) / row.len() as f64 } else { 0.0 };
        let smoothing = f64::from(smoothing);
        *result = (log_sum - (1.0 - smoothing) * f64::from(row[target]) - smoothing * mean) as f32;
        if gradient {
            let share = (1.0 / exps) as f32;
            let spread = (smoothing / row.len() as f64) as f32;
            for logit in row.iter_mut() {
                *logit = exp(*logit - highest) * share - spread;
            }
            row[target] -= (1.0 - smoothing) as f32;
        }
    }
}

/// The sum of `f` over a row: in f32 over pieces, in f64 over these.
#[inline(always)]
fn fold_wide(row: &[f32], f: impl Fn(f32) -> f32 + Copy) -> f64 {
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
