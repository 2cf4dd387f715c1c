//! The learning rate, counted in optimizer updates.

use crate::config::{LrSchedule, TrainingSection};

/// Linear warmup to the peak, then linear, cosine, no or late decay to `min_lr` at the last update.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    peak: f64,
    floor: f64,
    warmup: u64,
    total: u64,
    shape: LrSchedule,
    /// Of the updates, the last ones in which [`LrSchedule::Wsd`] falls.
    decay_share: f64,
}

impl Schedule {
    /// The schedule of a run of `total` updates on `world` ranks.
    pub fn new(training: &TrainingSection, world: usize, total: u64) -> Schedule {
        let scale = if training.scale_lr_by_world_size { world as f64 } else { 1.0 };
        Schedule {
            peak: training.learning_rate * scale,
            floor: training.min_lr * scale,
            warmup: training.warmup_steps,
            total,
            shape: training.lr_schedule,
            decay_share: training.lr_decay_share,
        }
    }

    /// The rate of the update after `done` updates: `peak / warmup` for the first, `peak` for the last of warmup.
    pub fn at(&self, done: u64) -> f64 {
        if done < self.warmup {
            return self.peak * (done + 1) as f64 / self.warmup as f64;
        }
        let span = self.total.saturating_sub(self.warmup).max(1);
        let progress = ((done - self.warmup) as f64 / span as f64).min(1.0);
        let share = match self.shape {
            LrSchedule::Constant => 1.0,
            LrSchedule::Linear => 1.0 - progress,
            LrSchedule::Wsd => {
                let decay = (self.total as f64 * self.decay_share).min(span as f64).max(1.0);
                (self.total.saturating_sub(done) as f64 / decay).min(1.0)
            }
            LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.floor + (self.peak - self.floor) * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: LrSchedule) -> Schedule {
        let training = TrainingSection {
            learning_rate: 1.0,
            min_lr: 0.1,
            warmup_steps: 10,
            lr_schedule: shape,
            ..Default::default()
        };
        Schedule::new(&training, 4, 110)
    }

    #[test]
    fn warms_up_then_follows_its_shape() {
        use LrSchedule::{Constant, Cosine, Linear, Wsd};
        for shape in [Linear, Cosine, Constant, Wsd] {
            for (done, expected) in [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0)] {
                assert!((schedule(shape).at(done) - expected).abs() < 1e-12);
            }
        }
        for (shape, middle, end) in [(Linear, 0.55, 0.1), (Cosine, 0.55, 0.1), (Constant, 1.0, 1.0), (Wsd, 1.0, 0.1)] {
            assert!((schedule(shape).at(60) - middle).abs() < 1e-12);
            assert!((schedule(shape).at(110) - end).abs() < 1e-12);
            assert!((schedule(shape).at(1000) - end).abs() < 1e-12);
        }
        // Of 110 updates the last fifth, 22, bring it down.
        for (done, expected) in [(88, 1.0), (99, 0.55), (109, 0.1 + 0.9 / 22.0)] {
            assert!((schedule(Wsd).at(done) - expected).abs() < 1e-12);
        }
        let quarter = 0.1 + 0.9 * 0.5 * (1.0 + (std::f64::consts::PI / 4.0).cos());
        assert!((schedule(Cosine).at(35) - quarter).abs() < 1e-12);
    }

    #[test]
    fn no_warmup_and_a_warmup_longer_than_the_run() {
        let training = TrainingSection { learning_rate: 1.0, warmup_steps: 0, ..Default::default() };
        assert_eq!(Schedule::new(&training, 1, 10).at(0), 1.0);
        let training = TrainingSection { learning_rate: 1.0, warmup_steps: 100, ..Default::default() };
        assert_eq!(Schedule::new(&training, 1, 10).at(9), 0.1);
    }

    #[test]
    fn scales_by_the_world_on_request() {
        let training = TrainingSection { scale_lr_by_world_size: true, warmup_steps: 0, ..Default::default() };
        assert!((Schedule::new(&training, 4, 10).at(0) - 4.0 * training.learning_rate).abs() < 1e-15);
    }
}
