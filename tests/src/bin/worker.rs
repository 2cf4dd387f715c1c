//! One rank of the jobs that the tests start. Every command checks what it gets and ends with a code other than 0 when
//! something is wrong.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use half::{bf16, f16};
use hvd_core::{Allreduce, Compression, Element, ReduceOp, World};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Random operations, checked against a plain computation.
    Conformance {
        /// What must serve them.
        #[arg(long)]
        expect_backend: String,
        /// The same on all ranks.
        #[arg(long)]
        seed: u64,
        #[arg(long, default_value_t = 40)]
        cases: usize,
    },
    /// Reduces again and again; says `started` and `stepping`.
    Steps {
        #[arg(long)]
        count: usize,
        #[arg(long)]
        elements: usize,
    },
    /// One rank panics while the others reduce.
    Panic {
        #[arg(long)]
        rank: usize,
    },
    /// One rank returns from main with code 0 while the others reduce.
    Leave {
        #[arg(long)]
        rank: usize,
    },
    /// One rank does not submit what the others do until a file is there; without a file it only wants to shut down.
    Stall {
        #[arg(long)]
        rank: usize,
        #[arg(long)]
        until: Option<PathBuf>,
    },
    /// Does for ever what keeps one phase of the runtime busy; says `busy`.
    Busy {
        #[arg(long)]
        phase: Phase,
    },
    /// Makes one world after the other; every other one is failed by one of its ranks.
    Again {
        #[arg(long)]
        worlds: usize,
    },
    /// Two worlds at once.
    Twice,
    /// Prints this rank's place.
    Topology,
}

/// Where the runtime spends its time.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Phase {
    /// Worlds begin and end.
    Start,
    /// Many small tensors, under names that were not heard before.
    Negotiation,
    /// Tensors are fused and narrowed.
    Copy,
    /// Large tensors travel as they are.
    Wire,
}

fn main() -> Result<()> {
    let command = Args::parse().command;
    match command {
        Command::Busy { phase } => return busy(phase),
        Command::Again { worlds } => return again(worlds),
        Command::Twice => return twice(),
        _ => {}
    }
    let world = hvd_core::init()?;
    println!("rank {} is process {}", world.rank(), std::process::id());
    match command {
        Command::Conformance { expect_backend, seed, cases } => {
            let backend = world.backend().to_string();
            ensure!(backend == expect_backend, "served by {backend}, expected {expect_backend}");
            conformance(&world, seed, cases)?;
        }
        Command::Steps { count, elements } => steps(&world, count, elements)?,
        Command::Panic { rank } => {
            steps(&world, 3, 1000)?;
            assert!(world.rank() != rank, "this rank was told to panic");
            steps(&world, usize::MAX, 1000)?;
        }
        Command::Leave { rank } => {
            steps(&world, 3, 1000)?;
            if world.rank() == rank {
                return Ok(());
            }
            steps(&world, usize::MAX, 1000)?;
        }
        Command::Stall { rank, until } => stall(&world, rank, until)?,
        Command::Topology => println!("{:?}", world.topology()),
        Command::Busy { .. } | Command::Again { .. } | Command::Twice => {} // Make their own worlds.
    }
    hvd_core::shutdown()?;
    println!("rank {} is done", world.rank());
    Ok(())
}

fn stall(world: &World, rank: usize, until: Option<PathBuf>) -> Result<()> {
    steps(world, 3, 10)?;
    if world.rank() == rank {
        let Some(file) = until else { return Ok(world.shutdown()?) };
        while !file.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    // One that is known from the steps before, and a new one.
    for handle in ["steps", "fresh"].map(|name| world.allreduce_async(name, vec![1.0f32; 10], ReduceOp::Sum)) {
        ensure!(handle?.wait()? == vec![world.size() as f32; 10], "a wrong sum");
    }
    Ok(())
}

fn steps(world: &World, count: usize, elements: usize) -> Result<()> {
    println!("started");
    let mut data = vec![0.0f32; elements];
    for step in 0..count {
        data.fill(world.rank() as f32);
        world.allreduce("steps", &mut data, ReduceOp::Sum)?;
        let expected = (world.size() * (world.size() - 1) / 2) as f32;
        ensure!(data.iter().all(|&x| x == expected), "a wrong sum in step {step}");
        if step == 1 {
            println!("stepping");
        }
    }
    Ok(())
}

fn busy(phase: Phase) -> Result<()> {
    let mut world = hvd_core::init()?;
    println!("rank {} is process {}\nbusy", world.rank(), std::process::id());
    for step in 0usize.. {
        let (count, elements) = match phase {
            Phase::Start => (1, 10),
            Phase::Negotiation => (100, 4),
            Phase::Copy => (20, 100_000),
            Phase::Wire => (2, 1_500_000),
        };
        let compression = if matches!(phase, Phase::Copy) { Compression::Fp16 } else { Compression::None };
        let options = Allreduce::new(ReduceOp::Sum).compression(compression);
        let fresh = if matches!(phase, Phase::Negotiation) { step } else { 0 };
        let submit = |at| world.allreduce_async(&format!("{fresh}.{at}"), vec![world.rank() as f32; elements], options);
        let handles = (0..count).map(submit).collect::<hvd_core::Result<Vec<_>>>()?;
        let expected = (world.size() * (world.size() - 1) / 2) as f32;
        for handle in handles {
            ensure!(handle.wait()?.iter().all(|&x| x == expected), "a wrong sum in step {step}");
        }
        if matches!(phase, Phase::Start) {
            hvd_core::shutdown()?;
            world = hvd_core::init()?;
        }
    }
    Ok(())
}

fn again(worlds: usize) -> Result<()> {
    for number in 0..worlds {
        let world = hvd_core::init()?;
        let (failing, culprit) = (number % 2 == 1, number % world.size());
        if failing && world.rank() == culprit {
            world.barrier()?;
            world.abort("it was told to");
        } else if failing {
            let end = world.barrier().and_then(|()| world.barrier());
            let error = end.expect_err("the world was failed").to_string();
            ensure!(error == format!("lost rank {culprit}: it was told to"), "{error}");
        } else {
            let mut data = vec![1.0f32; 1000];
            world.allreduce("data", &mut data, ReduceOp::Sum)?;
            ensure!(data == vec![world.size() as f32; 1000], "a wrong sum in world {number}");
        }
        ensure!(hvd_core::shutdown().is_err() == failing, "world {number} ended differently");
    }
    println!("{worlds} worlds");
    Ok(())
}

fn twice() -> Result<()> {
    let (one, other) = (World::from_env()?, World::from_env()?);
    for step in 0..20 {
        let first = one.allreduce_async("both", vec![1i32; 1000], ReduceOp::Sum)?;
        let second = other.allreduce_async("both", vec![step; 5000], ReduceOp::Max)?;
        ensure!(second.wait()? == vec![step; 5000], "a wrong maximum in step {step}");
        ensure!(first.wait()? == vec![one.size() as i32; 1000], "a wrong sum in step {step}");
    }
    one.shutdown()?;
    other.barrier()?;
    other.shutdown()?;
    println!("two worlds");
    Ok(())
}

fn conformance(world: &World, seed: u64, cases: usize) -> Result<()> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for case in 0..cases {
        // Mostly small, sometimes none, now and then larger than any staging area.
        let elements = match random.random_range(0..10) {
            0 => random.random_range(0..3),
            1 => random.random_range(100_000..700_000),
            _ => random.random_range(0..20_000),
        };
        let op = [ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product];
        let op = op[random.random_range(0..op.len())];
        let compression = [Compression::None, Compression::Fp16, Compression::Bf16][random.random_range(0..3)];
        let options = Allreduce::new(op).compression(compression);
        let run = Case { world, name: format!("case {case}"), elements, options, seed: random.random() };
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
    name: String,
    elements: usize,
    options: Allreduce,
    seed: u64,
}

impl Case<'_> {
    fn check<T: Number>(&self) -> Result<()> {
        if self.options.op.supports(T::DTYPE) {
            self.allreduce::<T>().with_context(|| format!("{} {} {:?}", self.name, T::DTYPE, self.options))?;
        }
        self.movement::<T>().with_context(|| format!("{} {}", self.name, T::DTYPE))
    }

    /// Small values, so that no sum leaves the range of an 8-bit integer with 8 ranks.
    fn tensor<T: Number>(&self, rank: usize, elements: usize) -> Vec<T> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed ^ rank as u64);
        (0..elements).map(|_| T::from_small(random.random_range(-7..=7))).collect()
    }

    fn allreduce<T: Number>(&self) -> Result<()> {
        let Case { world, elements, options, .. } = self;
        let mut data = self.tensor::<T>(world.rank(), *elements);
        let pending = world.allreduce_async(&format!("{} beside", self.name), data.clone(), *options)?;
        world.allreduce(&self.name, &mut data, *options)?;
        ensure!(pending.wait()? == data, "the same operation beside gave other bits");
        let all: Vec<Vec<T>> = (0..world.size()).map(|rank| self.tensor(rank, *elements)).collect();
        // Every hop may round a partial result once.
        let tolerance = T::epsilon(options.compression) * (world.size() + 2) as f64;
        for (at, &got) in data.iter().enumerate() {
            let column: Vec<f64> = all.iter().map(|rank| rank[at].as_f64()).collect();
            let (expected, magnitude) = reference(options.op, &column, T::DTYPE.is_float());
            let error = (got.as_f64() - expected).abs();
            ensure!(error <= tolerance * magnitude, "element {at}: got {got:?}, expected {expected} of {column:?}");
        }
        let digest = digest(&data);
        let digests = world.allgather(&format!("{} digest", self.name), &[digest])?;
        ensure!(digests.iter().all(|&other| other == digest), "ranks hold different bits: {digests:?}");
        Ok(())
    }

    fn movement<T: Number>(&self) -> Result<()> {
        let Case { world, elements, .. } = self;
        let root = self.seed as usize % world.size();
        let mut data = self.tensor::<T>(world.rank(), *elements);
        world.broadcast(&format!("{} broadcast", self.name), &mut data, root)?;
        ensure!(data == self.tensor::<T>(root, *elements), "a wrong broadcast");
        let rows = |rank: usize| elements * (rank % 3) / 4;
        let own = self.tensor::<T>(world.rank(), rows(world.rank()));
        let gathered = world.allgather(&format!("{} gather", self.name), &own)?;
        let expected: Vec<T> = (0..world.size()).flat_map(|rank| self.tensor(rank, rows(rank))).collect();
        ensure!(gathered == expected, "a wrong allgather");
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
