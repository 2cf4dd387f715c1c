//! Random operations, the same on all ranks, checked against a plain computation.

#[path = "../../hvd-core/tests/elements/adasum.rs"]
mod adasum;

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use hvd_core::collective::even_chunks;
use hvd_core::{Allreduce, Compression, Element, ProcessSet, ReduceOp, World};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Runs `cases` random cases. Seed and number must be the same on all ranks.
///
/// # Errors
/// The first operation that fails, or whose result is not as it should be.
pub fn run(world: &World, seed: u64, cases: usize) -> Result<()> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let neighbours: Vec<_> = (world.rank() % 2..world.size()).step_by(2).collect();
    let set = world.process_set(&neighbours)?.context("this rank is in its own set")?;
    for case in 0..cases {
        // Mostly small, sometimes none, now and then larger than any staging area.
        let elements = match random.random_range(0..10) {
            0 => random.random_range(0..3),
            1 => random.random_range(100_000..400_000),
            _ => random.random_range(0..20_000),
        };
        let op = [ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product];
        let op = op[random.random_range(0..op.len())];
        let compression = [Compression::None, Compression::Fp16, Compression::Bf16][random.random_range(0..3)];
        let options = Allreduce::new(op).compression(compression);
        let run = Case { world, set: &set, name: format!("case {case}"), elements, options, seed: random.random() };
        match random.random_range(0..10) {
            0 => run.check::<f16>()?,
            1 => run.check::<bf16>()?,
            2 => run.check::<f64>()?,
            3 => run.check::<i32>()?,
            4 => run.check::<i64>()?,
            5 => run.check::<u8>()?,
            6 => run.check::<i8>()?,
            7 => run.check::<i16>()?,
            8 => run.check::<bool>()?,
            _ => run.check::<f32>()?,
        }
    }
    Ok(())
}

/// Elements as the reference sees them.
trait Number: Element {
    fn from_small(value: i32) -> Self;
    fn as_f64(self) -> f64;
    /// Relative error of one rounding on the wire.
    fn epsilon(compression: Compression) -> f64;
}

macro_rules! numbers {
    ($($type:ty, $from:expr, $as:expr, $epsilon:expr);* $(;)?) => {$(
        impl Number for $type {
            fn from_small(value: i32) -> Self { ($from)(value) }
            fn as_f64(self) -> f64 { ($as)(self) }
            fn epsilon(compression: Compression) -> f64 { ($epsilon)(compression) }
        }
    )*};
}

const F16_EPSILON: f64 = 1.0 / 1024.0;
const BF16_EPSILON: f64 = 1.0 / 128.0;

fn compressed(compression: Compression, own: f64) -> f64 {
    match compression {
        Compression::None => own,
        Compression::Fp16 => F16_EPSILON,
        Compression::Bf16 => BF16_EPSILON,
    }
}

fn exact(_: Compression) -> f64 {
    0.0
}

numbers! {
    f16, |v| f16::from_f32(v as f32 / 8.0), f16::to_f64, |_| F16_EPSILON;
    bf16, |v| bf16::from_f32(v as f32 / 8.0), bf16::to_f64, |_| BF16_EPSILON;
    f32, |v| v as f32 / 7.0, f64::from, |c| compressed(c, f64::from(f32::EPSILON));
    f64, |v| f64::from(v) / 7.0, |x| x, |c| compressed(c, f64::EPSILON);
    i32, |v| v, f64::from, exact;
    i64, i64::from, |x| x as f64, exact;
    u8, |v: i32| v.unsigned_abs() as u8, f64::from, exact;
    i8, |v| v as i8, f64::from, exact;
    i16, |v| v as i16, f64::from, exact;
    bool, |v| v > 0, |x| if x { 1.0 } else { 0.0 }, exact;
}

struct Case<'a> {
    world: &'a World,
    /// Every other rank, this one among them.
    set: &'a ProcessSet,
    name: String,
    elements: usize,
    options: Allreduce,
    seed: u64,
}

impl Case<'_> {
    fn check<T: Number>(&self) -> Result<()> {
        let all: Vec<Vec<T>> = (0..self.world.size()).map(|rank| self.tensor(rank, self.elements)).collect();
        if self.options.op.supports(T::DTYPE) {
            let reductions = self.allreduce(&all).and_then(|()| self.reducescatter(&all));
            reductions.with_context(|| format!("{} {} {:?}", self.name, T::DTYPE, self.options))?;
        }
        if ReduceOp::Adasum.supports(T::DTYPE) {
            self.adasum::<T>().with_context(|| format!("{} {}", self.name, T::DTYPE))?;
        }
        self.movement(&all).with_context(|| format!("{} {}", self.name, T::DTYPE))
    }

    /// Small values, so that no sum leaves the range of an 8-bit integer with 8 ranks.
    fn tensor<T: Number>(&self, rank: usize, elements: usize) -> Vec<T> {
        self.numbers(rank, elements).map(|number| T::from_small(number - 7)).collect()
    }

    /// Numbers from 0 to 14.
    fn numbers(&self, rank: usize, elements: usize) -> impl Iterator<Item = i32> + use<> {
        let mut bytes = vec![0; elements];
        ChaCha8Rng::seed_from_u64(self.seed ^ rank as u64).fill_bytes(&mut bytes);
        bytes.into_iter().map(|byte| i32::from(byte % 15))
    }

    /// What this rank has of what every rank has.
    fn own<'a, T>(&self, all: &'a [Vec<T>]) -> &'a [T] {
        &all[self.world.rank()]
    }

    /// A name for one more operation of this case.
    fn name(&self, what: &str) -> String {
        format!("{} {what}", self.name)
    }

    fn allreduce<T: Number>(&self, all: &[Vec<T>]) -> Result<()> {
        let Case { world, elements, options, .. } = self;
        let own = self.own(all).to_vec();
        let mut data = own.clone();
        let pending = world.allreduce_async(&self.name("beside"), own.clone(), *options)?;
        world.allreduce(&self.name, &mut data, *options)?;
        ensure!(pending.wait()? == data, "the same operation beside gave other bits");
        let (mut whole, mut part) = (own.clone(), own);
        part.truncate(elements / 3);
        world.grouped_allreduce(&self.name("group"), &mut [&mut part, &mut whole], *options)?;
        ensure!(whole == data, "the same operation in a group gave other bits");
        self.check_reduced(&data, all.iter(), 0)?;
        self.check_same_bits(&data)?;
        self.allreduce_in_set(all)
    }

    fn allreduce_in_set<T: Number>(&self, all: &[Vec<T>]) -> Result<()> {
        let mut data = self.own(all).to_vec();
        self.set.allreduce(&self.name, &mut data, self.options)?;
        let members = self.set.ranks().iter().map(|&rank| &all[rank]);
        self.check_reduced(&data, members, 0).with_context(|| format!("{:?}", self.set))
    }

    /// `got` are the elements from `start` on that `ranks` have reduced.
    fn check_reduced<'a, T: Number>(
        &self,
        got: &[T],
        ranks: impl Iterator<Item = &'a Vec<T>> + Clone,
        start: usize,
    ) -> Result<()> {
        // Every hop may round a partial result once.
        let tolerance = T::epsilon(self.options.compression) * (self.world.size() + 2) as f64;
        let mut column = Vec::new();
        for (&got, at) in got.iter().zip(start..) {
            column.clear();
            column.extend(ranks.clone().map(|rank| rank[at].as_f64()));
            let (expected, magnitude) = reference(self.options.op, &column, T::DTYPE.is_float());
            let error = (got.as_f64() - expected).abs();
            ensure!(error <= tolerance * magnitude, "element {at}: got {got:?}, expected {expected} of {column:?}");
        }
        Ok(())
    }

    fn check_same_bits<T: Number>(&self, data: &[T]) -> Result<()> {
        let digest = digest(data);
        let digests = self.world.allgather(&self.name("digest"), &[digest])?;
        ensure!(digests.iter().all(|&other| other == digest), "ranks hold different bits: {digests:?}");
        Ok(())
    }

    fn reducescatter<T: Number>(&self, all: &[Vec<T>]) -> Result<()> {
        let Case { world, elements, options, .. } = self;
        let own = self.own(all);
        let share = even_chunks(*elements, world.size())[world.rank()].clone();
        let got = world.reducescatter(&self.name("scatter"), own, *options)?;
        ensure!(got.len() == share.len(), "{} elements of a share {share:?}", got.len());
        let grouped = world.grouped_reducescatter(&self.name("scatters"), &[&own[..elements / 3], own], *options)?;
        ensure!(grouped[1] == got, "the same operation in a group gave other bits");
        self.check_reduced(&got, all.iter(), share.start)
    }

    /// Of positive numbers, as Adasum jumps where vectors cancel out: next to nothing halves what it is added to, and nothing
    /// does not.
    fn adasum<T: Number>(&self) -> Result<()> {
        let Case { world, options: Allreduce { compression, .. }, .. } = self;
        let elements = self.elements.min(20_000);
        let tensor = |rank: usize| self.numbers(rank, elements).map(|number| T::from_small(number + 1));
        let mut got: Vec<T> = tensor(world.rank()).collect();
        world.allreduce(&self.name("adasum"), &mut got, Allreduce::new(ReduceOp::Adasum).compression(*compression))?;
        let all = (0..world.size()).map(|rank| tensor(rank).map(T::as_f64).collect()).collect();
        let numbers: Vec<_> = got.iter().map(|x| x.as_f64()).collect();
        adasum::check(all, &numbers, T::epsilon(*compression)).map_err(anyhow::Error::msg)?;
        self.check_same_bits(&got)
    }

    fn movement<T: Number>(&self, all: &[Vec<T>]) -> Result<()> {
        let Case { world, elements, .. } = self;
        let root = self.seed as usize % world.size();
        let mut data = self.own(all).to_vec();
        world.broadcast(&self.name("broadcast"), &mut data, root)?;
        ensure!(data == all[root], "a wrong broadcast");
        let rows = |rank: usize| &all[rank][..elements * (rank % 3) / 4];
        let own = rows(world.rank());
        let expected = (0..world.size()).map(rows).collect::<Vec<_>>().concat();
        let gathered = world.allgather(&self.name("gather"), own)?;
        ensure!(gathered == expected, "a wrong allgather");
        let grouped = world.grouped_allgather(&self.name("gathers"), &[own, &[]])?;
        ensure!(grouped == [expected, Vec::new()], "a wrong grouped allgather");
        self.message(all)?;
        self.alltoall::<T>()
    }

    fn message<T: Number>(&self, all: &[Vec<T>]) -> Result<()> {
        let (rank, size) = (self.world.rank(), self.world.size());
        let (next, previous, tag) = ((rank + 1) % size, (rank + size - 1) % size, self.seed as u32 % 3);
        if next == rank {
            return Ok(());
        }
        let sending = self.world.send_async(next, tag, all[rank].clone())?;
        let received = self.world.recv::<T>(previous, tag)?;
        sending.wait()?;
        ensure!(received == all[previous], "a wrong message");
        Ok(())
    }

    fn alltoall<T: Number>(&self) -> Result<()> {
        let Case { world, elements, .. } = self;
        let (rank, size) = (world.rank(), world.size());
        let block = |from: usize, to: usize, len| self.tensor::<T>(64 + from * size + to, len);
        let uneven = |from: usize, to: usize| elements * ((3 * from + 5 * to + self.seed as usize) % 4) / 8;
        let splits: Vec<_> = (0..size).map(|to| uneven(rank, to)).collect();
        let data: Vec<_> = (0..size).flat_map(|to| block(rank, to, splits[to])).collect();
        let (got, lengths) = world.alltoall(&self.name("blocks"), &data, Some(&splits))?;
        let expected: Vec<_> = (0..size).flat_map(|from| block(from, rank, uneven(from, rank))).collect();
        ensure!(got == expected, "a wrong alltoall");
        ensure!(lengths == (0..size).map(|from| uneven(from, rank)).collect::<Vec<_>>(), "wrong lengths {lengths:?}");

        let equal = elements / size;
        let data: Vec<_> = (0..size).flat_map(|to| block(rank, to, equal)).collect();
        let (got, _) = world.alltoall(&self.name("equal blocks"), &data, None)?;
        let expected: Vec<_> = (0..size).flat_map(|from| block(from, rank, equal)).collect();
        ensure!(got == expected, "a wrong alltoall of equal blocks");
        Ok(())
    }
}

/// The result in f64, and the magnitude on which rounding errors act.
fn reference(op: ReduceOp, column: &[f64], is_float: bool) -> (f64, f64) {
    let ranks = column.len() as f64;
    let magnitude: f64 = column.iter().map(|x| x.abs()).sum();
    match op {
        ReduceOp::Sum => (column.iter().sum(), magnitude),
        ReduceOp::Average => {
            let mean = column.iter().sum::<f64>() / ranks;
            (if is_float { mean } else { mean.floor() }, magnitude)
        }
        ReduceOp::Min => column.iter().copied().fold(f64::INFINITY, f64::min).into_pair(magnitude),
        ReduceOp::Max => column.iter().copied().fold(f64::NEG_INFINITY, f64::max).into_pair(magnitude),
        ReduceOp::Adasum => unreachable!("not element by element"),
        ReduceOp::Product => {
            let product: f64 = column.iter().product();
            // A product of roundings; denormal 16-bit results are exact to their absolute step.
            (product, product.abs() * ranks + 1e-3)
        }
    }
}

trait IntoPair {
    fn into_pair(self, magnitude: f64) -> (f64, f64);
}

impl IntoPair for f64 {
    fn into_pair(self, magnitude: f64) -> (f64, f64) {
        (self, magnitude)
    }
}

/// FNV-1a over the elements' exact values.
fn digest<T: Number>(data: &[T]) -> i64 {
    let step = |hash: u64, x: &T| (hash ^ x.as_f64().to_bits()).wrapping_mul(0x0100_0000_01b3);
    data.iter().fold(0xcbf2_9ce4_8422_2325, step) as i64
}
