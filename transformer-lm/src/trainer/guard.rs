//! Which updates are not made: those whose loss or gradient is not finite, and outliers.

use crate::checkpoint::GuardState;
use crate::config::TrainingSection;

/// Updates that outliers are measured against.
const WINDOW: usize = 128;

/// Why an update is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// fp16: the gradients overflowed; the scale is halved.
    Overflow,
    /// Loss or gradient is infinite or NaN.
    NotFinite,
    /// The loss is far above those before.
    LossOutlier,
    /// The gradient norm is far above those before.
    NormOutlier,
}

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Skip::Overflow => "overflow in fp16",
            Skip::NotFinite => "not finite",
            Skip::LossOutlier => "the loss is an outlier",
            Skip::NormOutlier => "the gradient norm is an outlier",
        })
    }
}

/// Decides about updates. All ranks see the same figures and decide alike.
#[derive(Clone, Debug)]
pub struct Guard {
    /// What it has seen; part of a checkpoint, so that a resumed run decides alike.
    pub state: GuardState,
    /// Standard deviations above the mean that make an outlier; 0: none.
    z: f64,
    /// Skipped in a row before training ends.
    most: u64,
}

impl Guard {
    /// A guard that has seen nothing.
    pub fn new(training: &TrainingSection) -> Guard {
        Guard { state: GuardState::default(), z: training.skip_outliers_z, most: training.max_skipped_in_a_row }
    }

    /// Whether it wants to see gradient norms, also where nothing is clipped.
    pub fn wants_norm(&self) -> bool {
        self.z > 0.0
    }

    /// Accounts for an update before it is made; why it should be skipped.
    pub fn judge(&mut self, loss: f64, norm: Option<f64>) -> Option<Skip> {
        let skip = match loss.is_finite() && norm.is_none_or(f64::is_finite) {
            false => Some(Skip::NotFinite),
            true => self.outlier(loss, norm),
        };
        self.state.in_a_row = if skip.is_some() { self.state.in_a_row + 1 } else { 0 };
        self.state.skipped += u64::from(skip.is_some());
        skip
    }

    /// Whether so many updates in a row were skipped that training makes no sense.
    pub fn gives_up(&self) -> bool {
        self.state.in_a_row > self.most
    }

    /// Outliers are remembered too: a level that stays is no outlier for long.
    fn outlier(&mut self, loss: f64, norm: Option<f64>) -> Option<Skip> {
        if self.z == 0.0 {
            return None;
        }
        let high_loss = is_outlier(&mut self.state.losses, loss, self.z);
        let high_norm = norm.is_some_and(|norm| is_outlier(&mut self.state.norms, norm, self.z));
        high_loss.then_some(Skip::LossOutlier).or(high_norm.then_some(Skip::NormOutlier))
    }
}

/// Whether `value` is more than `z` standard deviations above the mean of a full window; it then is part of the window.
fn is_outlier(window: &mut Vec<f64>, value: f64, z: f64) -> bool {
    let full = window.len() >= WINDOW;
    let mean = window.iter().sum::<f64>() / window.len() as f64;
    let variance = window.iter().map(|other| (other - mean).powi(2)).sum::<f64>() / window.len() as f64;
    if full {
        window.remove(0);
    }
    window.push(value);
    full && value - mean > z * variance.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(skip_outliers_z: f64, max_skipped_in_a_row: u64) -> Guard {
        Guard::new(&TrainingSection { skip_outliers_z, max_skipped_in_a_row, ..Default::default() })
    }

    /// Losses that wander between 1.9 and 2.1.
    fn fill(guard: &mut Guard) {
        for i in 0..WINDOW {
            let wave = (i as f64).sin() / 10.0;
            assert_eq!(guard.judge(2.0 + wave, Some(1.0 + wave)), None);
        }
    }

    #[test]
    fn what_is_not_finite_is_skipped_and_counted() {
        let mut guard = guard(0.0, 2);
        assert_eq!(guard.judge(f64::NAN, None), Some(Skip::NotFinite));
        assert_eq!(guard.judge(1.0, Some(f64::INFINITY)), Some(Skip::NotFinite));
        assert!(!guard.gives_up());
        assert_eq!(guard.judge(1e9, Some(1e9)), None);
        (0..3).for_each(|_| assert!(guard.judge(f64::INFINITY, None).is_some()));
        assert!(guard.gives_up());
        assert_eq!(guard.state.skipped, 5);
    }

    #[test]
    fn outliers_are_told_once_the_window_is_full() {
        let mut guard = guard(6.0, 10);
        assert_eq!(guard.judge(1000.0, Some(1.0)), None);
        fill(&mut guard);
        assert_eq!(guard.judge(2.15, Some(1.15)), None);
        assert_eq!(guard.judge(3.0, Some(1.0)), Some(Skip::LossOutlier));
        assert_eq!(guard.judge(2.0, Some(9.0)), Some(Skip::NormOutlier));
        assert_eq!(guard.judge(0.1, Some(0.1)), None, "low is fine");
    }

    #[test]
    fn a_new_level_is_accepted_after_a_while() {
        let mut guard = guard(6.0, 1000);
        fill(&mut guard);
        let skipped = (0..WINDOW).filter(|_| guard.judge(4.0, Some(1.0)).is_some()).count();
        assert!((1..WINDOW / 4).contains(&skipped), "{skipped}");
    }

    #[test]
    fn a_state_that_was_saved_decides_alike() {
        let mut guard = guard(6.0, 10);
        fill(&mut guard);
        let text = serde_json::to_string(&guard.state).unwrap();
        let mut restored = Guard { state: serde_json::from_str(&text).unwrap(), ..guard.clone() };
        assert_eq!(restored.state, guard.state);
        assert_eq!(restored.judge(2.4, Some(1.0)), guard.judge(2.4, Some(1.0)));
    }
}
