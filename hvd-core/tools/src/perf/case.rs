//! One operation at one size, as it is repeated.

use anyhow::{Context, Result};
use hvd_core::{Allreduce, World};

use super::args::{Args, Bench};
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
        Bench::Allreduce => Box::new(OneAllreduce { common, data: buffer::<T>(count)? }),
        Bench::Broadcast => Box::new(OneBroadcast { common, data: buffer::<T>(count)? }),
        Bench::Allgather => {
            let own = buffer::<T>((count / world.size()).max(1))?;
            Box::new(OneAllgather { common, own, all: Vec::new() })
        }
        Bench::Fusion => {
            let tensors = (0..args.tensors).map(|_| buffer::<T>(count)).collect::<Result<_>>()?;
            let names = (0..args.tensors).map(|index| format!("fusion.{bytes}.{index}")).collect();
            Box::new(Fusion { common, names, tensors })
        }
    })
}

fn buffer<T: Value>(count: usize) -> Result<Vec<T>> {
    let mut data = Vec::new();
    let bytes = count * size_of::<T>();
    data.try_reserve_exact(count)
        .with_context(|| format!("no memory for a buffer of {bytes} bytes; lower --max-bytes"))?;
    data.resize(count, T::default());
    Ok(data)
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

    fn wrong_sums<T: Value>(&self, data: &[T]) -> u64 {
        let ranks = self.world.size();
        let tolerance = tolerance(T::DTYPE, self.args.compression.into(), ranks);
        count_wrong(data, tolerance, |index| reduced(self.args.op.0, T::DTYPE, ranks, index))
    }

    /// Elements that are not those of `rank`.
    fn wrong_copies<T: Value>(&self, data: &[T], rank: usize) -> u64 {
        count_wrong(data, 0.0, |index| input(self.args.op.0, rank, index))
    }
}

fn ring_share(ranks: usize) -> f64 {
    (ranks - 1) as f64 / ranks as f64
}

struct OneAllreduce<'a, T> {
    common: Common<'a>,
    data: Vec<T>,
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
        self.common.wrong_sums(&self.data)
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
        self.common.wrong_copies(&self.data, 0)
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
        missing as u64 + parts.map(|(rank, part)| self.common.wrong_copies(part, rank)).sum::<u64>()
    }
}

struct Fusion<'a, T> {
    common: Common<'a>,
    names: Vec<String>,
    tensors: Vec<Vec<T>>,
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
        let start = |(name, tensor): (&String, Vec<T>)| world.allreduce_async(name, tensor, options);
        let handles: Vec<_> = self.names.iter().zip(self.tensors.drain(..)).map(start).collect::<Result<_, _>>()?;
        self.tensors = handles.into_iter().map(|handle| handle.wait()).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn errors(&self) -> u64 {
        self.tensors.iter().map(|tensor| self.common.wrong_sums(tensor)).sum()
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
