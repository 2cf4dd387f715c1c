//! How many sequences go where, and for how long.

use tch::Device;

use crate::config::TrainingSection;
use crate::model::ModelConfig;
use crate::{Error, Result};

/// One update's sequences, dealt to ranks and micro-batches: `global = world × accumulation × micro`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Sequences per update over all ranks.
    pub global: usize,
    /// Sequences that a rank runs at once.
    pub micro: usize,
    /// Micro-batches per rank and update.
    pub accumulation: usize,
}

impl BatchPlan {
    /// Each rank's share of an update in the largest equal micro-batches that exceed neither `per_gpu_batch_size` nor
    /// `most`. The share is `global_batch_size` / `world`, or `per_gpu_batch_size` × `gradient_accumulation_steps`.
    ///
    /// # Errors
    /// [`Error::Config`] where the global batch cannot be dealt evenly to `world` ranks.
    pub fn new(training: &TrainingSection, world: usize, most: usize) -> Result<BatchPlan> {
        let limit = training.per_gpu_batch_size;
        let global = match training.global_batch_size {
            Some(global) => global,
            None => {
                let accumulation = training.gradient_accumulation_steps;
                let overflow =
                    || Error::Config(format!("training: {limit} × {accumulation} × {world} sequences overflow"));
                limit.checked_mul(accumulation).and_then(|n| n.checked_mul(world)).ok_or_else(overflow)?
            }
        };
        if !global.is_multiple_of(world) {
            return Err(Error::Config(format!(
                "training.global_batch_size = {global} cannot be dealt evenly to {world} ranks\n\
                 hint: take a multiple of {world}, for example {}, or another number of ranks",
                global.next_multiple_of(world)
            )));
        }
        let share = global / world;
        let largest = share.min(limit).min(most).max(1);
        let micro = (1..=largest).rev().find(|micro| share.is_multiple_of(*micro)).unwrap_or(1);
        Ok(BatchPlan { global, micro, accumulation: share / micro })
    }
}

/// The most sequences that a rank should run at once on `device`. On the CPU, where a larger micro-batch is no faster but the
/// logits of a large vocabulary take most of the memory, those stay within 128 MiB.
pub fn most_at_once(device: Device, shape: &ModelConfig) -> usize {
    const LOGITS_BYTES: usize = 128 << 20;
    let bytes_per_sequence = shape.max_seq_len.saturating_mul(shape.vocab_size).saturating_mul(size_of::<f32>());
    match device {
        Device::Cpu => (LOGITS_BYTES / bytes_per_sequence.max(1)).max(1),
        _ => usize::MAX,
    }
}

/// Updates in all: `max_steps`, else `epochs` times those of an epoch.
pub fn total_steps(training: &TrainingSection, steps_per_epoch: u64) -> u64 {
    training.max_steps.unwrap_or(training.epochs.saturating_mul(steps_per_epoch))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(global: Option<usize>, limit: usize, world: usize) -> Result<(usize, usize, usize)> {
        let training = TrainingSection { global_batch_size: global, per_gpu_batch_size: limit, ..Default::default() };
        BatchPlan::new(&training, world, usize::MAX).map(|plan| (plan.global, plan.micro, plan.accumulation))
    }

    #[test]
    fn the_global_batch_is_dealt_to_any_number_of_ranks() {
        let cases = [
            (24, 12, 1, (24, 12, 2)),
            (24, 12, 2, (24, 12, 1)),
            (24, 12, 3, (24, 8, 1)),
            (24, 4, 1, (24, 4, 6)),
            (24, 5, 1, (24, 4, 6)),
            (24, 12, 8, (24, 3, 1)),
            (24, 2, 4, (24, 2, 3)),
            (14, 4, 2, (14, 1, 7)),
        ];
        for (global, limit, world, expected) in cases {
            let (g, micro, accumulation) = plan(Some(global), limit, world).unwrap();
            assert_eq!((g, micro, accumulation), expected, "{global} {limit} {world}");
            assert_eq!(micro * accumulation * world, global);
        }
    }

    #[test]
    fn without_it_every_rank_takes_its_own() {
        assert_eq!(plan(None, 16, 3).unwrap(), (96, 16, 2));
    }

    #[test]
    fn a_large_vocabulary_means_small_micro_batches_on_the_cpu() {
        let shape = |vocab_size| ModelConfig { vocab_size, max_seq_len: 512, ..Default::default() };
        assert_eq!(most_at_once(Device::Cpu, &shape(50257)), 1);
        assert_eq!(most_at_once(Device::Cpu, &shape(256)), 256);
        assert_eq!(most_at_once(Device::Cuda(0), &shape(50257)), usize::MAX);
        let plan = BatchPlan::new(&TrainingSection::default(), 8, 1).unwrap();
        assert_eq!((plan.global, plan.micro, plan.accumulation), (256, 1, 32));
    }

    #[test]
    fn what_cannot_be_dealt_is_refused_with_the_numbers() {
        let message = plan(Some(24), 12, 5).unwrap_err().to_string();
        for part in ["training.global_batch_size = 24", "5 ranks", "for example 25"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(plan(None, usize::MAX, 2).is_err());
    }

    #[test]
    fn max_steps_decides_before_epochs() {
        let mut training = TrainingSection { epochs: 3, ..Default::default() };
        assert_eq!(total_steps(&training, 10), 30);
        training.max_steps = Some(7);
        assert_eq!(total_steps(&training, 10), 7);
    }
}
