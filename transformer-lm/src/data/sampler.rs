//! Stands in for `hvd_torch::DistributedSampler` until that has landed.

use crate::model::random::Generator;

#[derive(Debug)]
pub(super) struct DistributedSampler {
    len: u64,
    global: u64,
    rank: u64,
    size: u64,
    seed: u64,
}

impl DistributedSampler {
    pub(super) fn new(len: u64, global: usize, rank: usize, size: usize, seed: u64, _: bool) -> crate::Result<Self> {
        Ok(Self { len, global: global as u64, rank: rank as u64, size: size as u64, seed })
    }

    pub(super) fn batch(&self, epoch: u64, index: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..self.len).collect();
        let mut generator = Generator::new(self.seed, epoch);
        for i in (1..order.len()).rev() {
            order.swap(i, (generator.bits() % (i as u64 + 1)) as usize);
        }
        let local = self.global / self.size;
        let start = (index * self.global + self.rank * local) as usize;
        order[start..start + local as usize].to_vec()
    }
}
