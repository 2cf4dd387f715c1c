//! One operation at one size, as it is repeated.

use anyhow::Result;
use hvd_core::{Allreduce, World};

use super::args::{Args, Bench};
use super::buffer::Buffer;
use super::check::{Value, count_wrong, input, reduced, tolerance};

/// An operation with its buffers.
pub struct Case<'a, T> {
    world: &'a World,
    args: &'a Args,
    /// A name for each tensor.
    names: Vec<String>,
    /// What this rank contributes: one tensor, or several that are reduced together. What is done in place ends here.
    tensors: Vec<Buffer<T>>,
    /// What the last run gave, where it was not in place.
    output: Vec<T>,
}

impl<'a, T: Value> Case<'a, T> {
    /// The operation that `args` ask for. `bytes` are rounded down to whole elements, the same for each rank; at least one.
    pub fn new(world: &'a World, args: &'a Args, bytes: usize) -> Result<Self> {
        let count = (bytes / size_of::<T>()).max(1);
        let each = (count / world.size()).max(1);
        let (tensors, count) = match args.bench {
            Bench::Allreduce | Bench::Broadcast => (1, count),
            Bench::Allgather => (1, each),
            Bench::Reducescatter | Bench::Alltoall => (1, each * world.size()),
            Bench::Fusion => (args.tensors(), count),
        };
        let names = (0..tensors).map(|index| format!("{}.{bytes}.{index}", args.bench.name())).collect();
        let tensors = (0..tensors).map(|_| Buffer::new(world, args.buffer, count)).collect::<Result<_>>()?;
        Ok(Case { world, args, names, tensors, output: Vec::new() })
    }

    /// Its name in reports.
    pub fn name(&self) -> String {
        match self.args.bench {
            Bench::Fusion => format!("fusion_{}x{}", self.tensors.len(), human(size_of_val(&self.tensors[0][..]))),
            bench => bench.name(),
        }
    }

    /// Size of the whole operation, in bytes.
    pub fn bytes(&self) -> usize {
        let own: usize = self.tensors.iter().map(|tensor| size_of_val(&tensor[..])).sum();
        if self.args.bench == Bench::Allgather { own * self.world.size() } else { own }
    }

    /// Bus bandwidth over algorithm bandwidth (nccl-tests, PERFORMANCE.md).
    pub fn bus_factor(&self) -> f64 {
        let ranks = self.world.size() as f64;
        let ring_share = (ranks - 1.0) / ranks;
        match self.args.bench {
            Bench::Allreduce | Bench::Fusion => 2.0 * ring_share,
            Bench::Allgather | Bench::Reducescatter | Bench::Alltoall => ring_share,
            Bench::Broadcast => 1.0,
        }
    }

    /// Puts in what this rank contributes: ones, as in the other libraries' programs, or numbers that tell ranks and places
    /// apart.
    pub fn refill(&mut self) {
        let (rank, op) = (self.world.rank(), self.args.op().0);
        for tensor in &mut self.tensors {
            match self.args.check {
                false => tensor.fill(T::of(1.0)),
                true => tensor.iter_mut().enumerate().for_each(|(at, value)| *value = T::of(input(op, rank, at))),
            }
        }
    }

    /// Carries it out once.
    pub fn run(&mut self) -> Result<()> {
        let (world, options) = (self.world, self.options());
        let (name, data) = (&self.names[0], &mut self.tensors[0]);
        match self.args.bench {
            Bench::Allreduce => world.allreduce(name, data, options)?,
            Bench::Broadcast => world.broadcast(name, data, 0)?,
            Bench::Allgather => self.output = world.allgather(name, data)?,
            Bench::Reducescatter => self.output = world.reducescatter(name, data, options)?,
            Bench::Alltoall => self.output = world.alltoall(name, data, None)?.0,
            Bench::Fusion => self.run_together(options)?,
        }
        Ok(())
    }

    fn run_together(&mut self, options: Allreduce) -> hvd_core::Result<()> {
        let start = |(name, tensor): (&String, Buffer<T>)| tensor.allreduce_async(self.world, name, options);
        let handles: Vec<_> = self.names.iter().zip(self.tensors.drain(..)).map(start).collect::<Result<_, _>>()?;
        self.tensors = handles.into_iter().map(|handle| handle.wait()).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Wrong elements of the last result.
    pub fn errors(&self) -> u64 {
        let (own, rank) = (&self.tensors[0], self.world.rank());
        let each = own.len() / self.world.size();
        match self.args.bench {
            Bench::Allreduce | Bench::Fusion => self.tensors.iter().map(|tensor| self.wrong_sums(tensor, 0)).sum(),
            Bench::Broadcast => self.wrong_copies(own, 0, 0),
            Bench::Allgather => self.wrong_parts(own.len(), 0),
            Bench::Alltoall => self.wrong_parts(each, each * rank),
            Bench::Reducescatter => {
                each.abs_diff(self.output.len()) as u64 + self.wrong_sums(&self.output, each * rank)
            }
        }
    }

    fn options(&self) -> Allreduce {
        Allreduce::new(self.args.op().0).compression(self.args.compression.into())
    }

    /// Elements that are not the ranks' combined elements from `first` on.
    fn wrong_sums(&self, data: &[T], first: usize) -> u64 {
        let (op, ranks) = (self.args.op().0, self.world.size());
        let tolerance = tolerance(T::DTYPE, self.args.compression.into(), ranks);
        count_wrong(data, tolerance, |index| reduced(op, T::DTYPE, ranks, first + index))
    }

    /// Elements that are not those of `rank` from `first` on.
    fn wrong_copies(&self, data: &[T], rank: usize, first: usize) -> u64 {
        count_wrong(data, 0.0, |index| input(self.args.op().0, rank, first + index))
    }

    /// Elements of the output that are not `each` of every rank, those from `first` on; or that are missing.
    fn wrong_parts(&self, each: usize, first: usize) -> u64 {
        let missing = (each * self.world.size()).abs_diff(self.output.len());
        let parts = self.output.chunks(each).enumerate();
        missing as u64 + parts.map(|(rank, part)| self.wrong_copies(part, rank, first)).sum::<u64>()
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
