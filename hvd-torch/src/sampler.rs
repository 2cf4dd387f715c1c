//! Which items a rank trains on, in which order.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::random::mix;

/// Deals the items `0 .. len` in global batches, and of each global batch a share to every rank.
///
/// What a global batch holds depends on the seed, the epoch and its index alone, not on the number of ranks. Within an
/// epoch no item comes twice; the last, partial batch is dropped. With shuffling, the order is a pseudo-random
/// permutation that is computed item by item: nothing is stored, whatever the length.
#[derive(Clone, Debug)]
pub struct DistributedSampler {
    len: u64,
    global_batch: u64,
    /// This rank's part of a global batch.
    share: Range<u64>,
    seed: u64,
    shuffle: bool,
}

impl DistributedSampler {
    /// A sampler for `rank` of `size` over `len` items, `global_batch` of them at a time on all ranks together.
    ///
    /// # Errors
    /// If `global_batch` does not divide by `size`, or there are fewer items than one global batch.
    pub fn new(
        len: u64,
        global_batch: usize,
        rank: usize,
        size: usize,
        seed: u64,
        shuffle: bool,
    ) -> Result<DistributedSampler> {
        if rank >= size {
            return Err(Error::invalid(format!("there is no rank {rank} in a world of {size}")));
        }
        if global_batch == 0 || !global_batch.is_multiple_of(size) {
            return Err(Error::invalid(format!("a global batch of {global_batch} does not divide by {size} ranks")));
        }
        if len < global_batch as u64 {
            return Err(Error::invalid(format!("{len} items do not fill one global batch of {global_batch}")));
        }
        let per_rank = (global_batch / size) as u64;
        let share = rank as u64 * per_rank..(rank as u64 + 1) * per_rank;
        Ok(DistributedSampler { len, global_batch: global_batch as u64, share, seed, shuffle })
    }

    /// Number of whole global batches.
    pub fn batches_per_epoch(&self) -> u64 {
        self.len / self.global_batch
    }

    /// This rank's items of the global batch `index` of `epoch`; the ranks' items, by rank, are the global batch.
    ///
    /// # Panics
    /// If `index` is not below [`DistributedSampler::batches_per_epoch`].
    pub fn batch(&self, epoch: u64, index: u64) -> Vec<u64> {
        assert!(index < self.batches_per_epoch(), "batch {index} of {}", self.batches_per_epoch());
        let start = index * self.global_batch;
        let positions = start + self.share.start..start + self.share.end;
        if !self.shuffle {
            return positions.collect();
        }
        let permutation = Permutation::new(self.len, mix(&[self.seed, epoch]));
        positions.map(|position| permutation.at(position)).collect()
    }
}

/// A pseudo-random permutation of `0 .. len` chosen by a key: a Feistel network over the next even number of bits,
/// walked along its cycle until it lands below `len` (less than 4 rounds through the network on average).
#[derive(Clone, Debug)]
struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; 8],
}

impl Permutation {
    fn new(len: u64, key: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let keys = std::array::from_fn(|round| mix(&[key, round as u64]));
        Permutation { len, half_bits: bits.div_ceil(2).max(1), keys }
    }

    fn at(&self, position: u64) -> u64 {
        let mut value = self.network(position);
        while value >= self.len {
            value = self.network(value);
        }
        value
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(&[key, right]) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn epoch(len: u64, global: usize, size: usize, seed: u64, epoch: u64) -> Vec<Vec<u64>> {
        let samplers: Vec<_> =
            (0..size).map(|rank| DistributedSampler::new(len, global, rank, size, seed, true).unwrap()).collect();
        let batch = |index| samplers.iter().flat_map(|sampler| sampler.batch(epoch, index)).collect();
        (0..samplers[0].batches_per_epoch()).map(batch).collect()
    }

    proptest! {
        #[test]
        fn each_item_comes_once(len in 1u64..3000, key in any::<u64>()) {
            let permutation = Permutation::new(len, key);
            let mut seen = vec![false; len as usize];
            for position in 0..len {
                let item = permutation.at(position) as usize;
                prop_assert!(!std::mem::replace(&mut seen[item], true));
            }
        }

        #[test]
        fn global_batches_do_not_depend_on_the_world(per in 1usize..5, seed in any::<u64>(), rest in 0u64..24, n in 1u64..5) {
            let global = 12 * per; // divides by 1, 2, 3, 4, 6
            let len = n * global as u64 + rest % global as u64;
            let alone = epoch(len, global, 1, seed, 3);
            prop_assert_eq!(alone.len() as u64, n);
            for size in [2, 3, 4, 6] {
                prop_assert_eq!(&alone, &epoch(len, global, size, seed, 3));
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed, at| epoch(1000, 10, 1, seed, at).concat();
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_eq!(order(1, 5), order(1, 5));
    }

    #[test]
    fn the_order_looks_random() {
        // Of 1000 items about one stays in place, and neighbours hardly ever stay neighbours.
        let order = epoch(1000, 10, 1, 7, 0).concat();
        assert!(order.iter().enumerate().filter(|(at, item)| *at as u64 == **item).count() < 10);
        assert!(order.windows(2).filter(|pair| pair[1] == pair[0] + 1).count() < 10);
        let first_half: u64 = order[..500].iter().sum();
        assert!((225_000..275_000).contains(&first_half), "{first_half}");
    }

    #[test]
    fn without_shuffling_items_come_in_order() {
        let sampler = DistributedSampler::new(13, 4, 1, 2, 0, false).unwrap();
        assert_eq!(sampler.batches_per_epoch(), 3);
        assert_eq!(sampler.batch(9, 2), [10, 11]);
    }

    #[test]
    fn huge_lengths_cost_nothing() {
        let sampler = DistributedSampler::new(u64::MAX, 8, 0, 1, 1, true).unwrap();
        let items = sampler.batch(0, sampler.batches_per_epoch() - 1);
        assert_eq!(items.len(), 8);
    }

    #[test]
    fn what_cannot_be_dealt_is_refused() {
        let error = |len, global, size| DistributedSampler::new(len, global, 0, size, 0, true).unwrap_err().to_string();
        assert!(error(100, 10, 3).contains("does not divide by 3"));
        assert!(error(9, 10, 1).contains("do not fill"));
        assert!(error(9, 0, 1).contains("does not divide"));
        assert!(DistributedSampler::new(9, 2, 2, 2, 0, true).is_err());
    }
}
