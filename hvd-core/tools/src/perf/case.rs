//! One operation at one size, as it is repeated.

use anyhow::Result;
use hvd_core::{Allreduce, World};

use super::args::{Args, Bench};
use super::buffer::{Buffer, private};
use super::check::{Value, count_wrong, input, reduced, tolerance};

/// An operation with its buffers.
pub trait Case {
    /// Its name in reports.
    fn name(&self) -> String;

    /// Size of the whole operation, in bytes.
    fn bytes(&self) -> usize;

    /// Bus bandwidth over algorithm bandwidth, for `ranks` ranks (nccl-tests, PERFORMANCE.md).
    fn bus_factor(&self, ranks: usize) -> f64;

    /// Puts in what this rank contributes.
    fn refill(&mut self);

    /// Carries it out once.
    fn run(&mut self) -> Result<()>;

    /// Wrong elements of the last result.
    fn errors(&self) -> u64;
}

/// The operation that `args` ask for. `bytes` are rounded down to whole elements, the same for each rank; at least one.
pub fn make<'a, T: Value>(world: &'a World, args: &'a Args, bytes: usize) -> Result<Box<dyn Case + 'a>> {
    let count = (bytes / size_of::<T>()).max(1);
    let common = Common { world, args };
    Ok(match args.bench {
        Bench::Allreduce => Box::new(OneAllreduce { common, data: Buffer::<T>::new(world, args.buffer, count)? }),
        Bench::Broadcast => Box::new(OneBroadcast { common, data: private::<T>(count)? }),
        Bench::Allgather => {
            let own = private::<T>((count / world.size()).max(1))?;
            Box::new(OneAllgather { common, own, all: Vec::new() })
        }
        Bench::Reducescatter => {
            let data = private::<T>((count / world.size()).max(1) * world.size())?;
            Box::new(OneReducescatter { common, data, share: Vec::new() })
        }
        Bench::Alltoall => {
            let data = private::<T>((count / world.size()).max(1) * world.size())?;
            Box::new(OneAlltoall { common, data, blocks: Vec::new() })
        }
        Bench::Fusion => {
            let tensor = |_| Buffer::<T>::new(world, args.buffer, count);
            let tensors = (0..args.tensors).map(tensor).collect::<Result<_>>()?;
            let names = (0..args.tensors).map(|index| format!("fusion.{bytes}.{index}")).collect();
            Box::new(Fusion { common, names, tensors })
        }
    })
}

/// What all operations know.
#[derive(Clone, Copy)]
struct Common<'a> {
    world: &'a World,
    args: &'a Args,
}

impl Common<'_> {
    fn options(&self) -> Allreduce {
        Allreduce::new(self.args.op.0).compression(self.args.compression.into())
    }

    /// Ones, as in the other libraries' programs, or numbers that tell ranks and places apart.
    fn fill<T: Value>(&self, data: &mut [T]) {
        if !self.args.check {
            return data.fill(T::of(1.0));
        }
        let rank = self.world.rank();
        data.iter_mut().enumerate().for_each(|(index, value)| *value = T::of(input(self.args.op.0, rank, index)));
    }

    /// Elements that are not the ranks' combined elements from `first` on.
    fn wrong_sums<T: Value>(&self, data: &[T], first: usize) -> u64 {
        let ranks = self.world.size();
        let tolerance = tolerance(T::DTYPE, self.args.compression.into(), ranks);
        count_wrong(data, tolerance, |index| reduced(self.args.op.0, T::DTYPE, ranks, first + index))
    }

    /// Elements that are not those of `rank` from `first` on.
    fn wrong_copies<T: Value>(&self, data: &[T], rank: usize, first: usize) -> u64 {
        count_wrong(data, 0.0, |index| input(self.args.op.0, rank, first + index))
    }
}

fn ring_share(ranks: usize) -> f64 {
    (ranks - 1) as f64 / ranks as f64
}

struct OneAllreduce<'a, T> {
    common: Common<'a>,
    data: Buffer<T>,
}

impl<T: Value> Case for OneAllreduce<'_, T> {
    fn name(&self) -> String {
        "allreduce".into()
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.data[..])
    }

    fn bus_factor(&self, ranks: usize) -> f64 {
        2.0 * ring_share(ranks)
    }

    fn refill(&mut self) {
        self.common.fill(&mut self.data);
    }

    fn run(&mut self) -> Result<()> {
        let name = format!("allreduce.{}", self.bytes());
        Ok(self.common.world.allreduce(&name, &mut self.data, self.common.options())?)
    }

    fn errors(&self) -> u64 {
        self.common.wrong_sums(&self.data, 0)
    }
}

struct OneBroadcast<'a, T> {
    common: Common<'a>,
    data: Vec<T>,
}

impl<T: Value> Case for OneBroadcast<'_, T> {
    fn name(&self) -> String {
        "broadcast".into()
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.data[..])
    }

    fn bus_factor(&self, _ranks: usize) -> f64 {
        1.0
    }

    fn refill(&mut self) {
        self.common.fill(&mut self.data);
    }

    fn run(&mut self) -> Result<()> {
        let name = format!("broadcast.{}", self.bytes());
        Ok(self.common.world.broadcast(&name, &mut self.data, 0)?)
    }

    fn errors(&self) -> u64 {
        self.common.wrong_copies(&self.data, 0, 0)
    }
}

struct OneAllgather<'a, T> {
    common: Common<'a>,
    own: Vec<T>,
    all: Vec<T>,
}

impl<T: Value> Case for OneAllgather<'_, T> {
    fn name(&self) -> String {
        "allgather".into()
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.own[..]) * self.common.world.size()
    }

    fn bus_factor(&self, ranks: usize) -> f64 {
        ring_share(ranks)
    }

    fn refill(&mut self) {
        self.common.fill(&mut self.own);
    }

    fn run(&mut self) -> Result<()> {
        self.all = self.common.world.allgather(&format!("allgather.{}", self.bytes()), &self.own)?;
        Ok(())
    }

    fn errors(&self) -> u64 {
        let parts = self.all.chunks(self.own.len()).enumerate();
        let missing = (self.own.len() * self.common.world.size()).abs_diff(self.all.len());
        missing as u64 + parts.map(|(rank, part)| self.common.wrong_copies(part, rank, 0)).sum::<u64>()
    }
}

struct OneReducescatter<'a, T> {
    common: Common<'a>,
    data: Vec<T>,
    share: Vec<T>,
}

impl<T: Value> Case for OneReducescatter<'_, T> {
    fn name(&self) -> String {
        "reducescatter".into()
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.data[..])
    }

    fn bus_factor(&self, ranks: usize) -> f64 {
        ring_share(ranks)
    }

    fn refill(&mut self) {
        self.common.fill(&mut self.data);
    }

    fn run(&mut self) -> Result<()> {
        let name = format!("reducescatter.{}", self.bytes());
        self.share = self.common.world.reducescatter(&name, &self.data, self.common.options())?;
        Ok(())
    }

    fn errors(&self) -> u64 {
        let each = self.data.len() / self.common.world.size();
        let first = each * self.common.world.rank();
        each.abs_diff(self.share.len()) as u64 + self.common.wrong_sums(&self.share, first)
    }
}

struct OneAlltoall<'a, T> {
    common: Common<'a>,
    data: Vec<T>,
    blocks: Vec<T>,
}

impl<T: Value> Case for OneAlltoall<'_, T> {
    fn name(&self) -> String {
        "alltoall".into()
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.data[..])
    }

    fn bus_factor(&self, ranks: usize) -> f64 {
        ring_share(ranks)
    }

    fn refill(&mut self) {
        self.common.fill(&mut self.data);
    }

    fn run(&mut self) -> Result<()> {
        self.blocks = self.common.world.alltoall(&format!("alltoall.{}", self.bytes()), &self.data, None)?.0;
        Ok(())
    }

    fn errors(&self) -> u64 {
        let each = self.data.len() / self.common.world.size();
        let first = each * self.common.world.rank();
        let blocks = self.blocks.chunks(each).enumerate();
        let wrong: u64 = blocks.map(|(rank, block)| self.common.wrong_copies(block, rank, first)).sum();
        self.data.len().abs_diff(self.blocks.len()) as u64 + wrong
    }
}

struct Fusion<'a, T> {
    common: Common<'a>,
    names: Vec<String>,
    tensors: Vec<Buffer<T>>,
}

impl<T: Value> Case for Fusion<'_, T> {
    fn name(&self) -> String {
        format!("fusion_{}x{}", self.tensors.len(), human(size_of_val(&self.tensors[0][..])))
    }

    fn bytes(&self) -> usize {
        self.tensors.iter().map(|tensor| size_of_val(&tensor[..])).sum()
    }

    fn bus_factor(&self, ranks: usize) -> f64 {
        2.0 * ring_share(ranks)
    }

    fn refill(&mut self) {
        self.tensors.iter_mut().for_each(|tensor| self.common.fill(tensor));
    }

    fn run(&mut self) -> Result<()> {
        let Common { world, .. } = self.common;
        let options = self.common.options();
        let start = |(name, tensor): (&String, Buffer<T>)| tensor.allreduce_async(world, name, options);
        let handles: Vec<_> = self.names.iter().zip(self.tensors.drain(..)).map(start).collect::<Result<_, _>>()?;
        self.tensors = handles.into_iter().map(|handle| handle.wait()).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn errors(&self) -> u64 {
        self.tensors.iter().map(|tensor| self.common.wrong_sums(tensor, 0)).sum()
    }
}

/// A size in the largest binary unit that divides it: `64KiB`.
pub fn human(bytes: usize) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = units.into_iter().find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes}B"), |(unit, name)| format!("{}{name}", bytes / unit))
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_are_short() {
        assert_eq!([1, 1536, 65536, 3 << 20, 1 << 30].map(human), ["1B", "1536B", "64KiB", "3MiB", "1GiB"]);
    }
}
