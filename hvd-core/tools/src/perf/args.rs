//! The command line of `hvd-perf`.

use std::str::FromStr;

use anyhow::{Result, bail, ensure};
use clap::{Parser, ValueEnum};
use hvd_core::{Backend, Compression, DType, ReduceOp};

/// Measures collectives on named buffers, through the engine, as a training job uses it.
///
/// Every rank runs the same command under any launcher; alone it is a world of one. Before each iteration buffers are filled
/// and a barrier passed; the time of an iteration is that of its slowest rank.
///
/// Sizes are of the whole operation, as in nccl-tests: for allgather all that a rank gets, for reducescatter and alltoall all
/// that it gives. Bus bandwidth is the size times 2(n-1)/n (allreduce, fusion) or (n-1)/n (allgather, reducescatter,
/// alltoall), per second: what the slowest link must carry whatever the algorithm.
#[derive(Clone, Debug, Parser)]
#[command(name = "hvd-perf", version, after_help = EXAMPLES)]
pub struct Args {
    /// What to measure
    #[arg(value_enum)]
    pub bench: Bench,

    /// Smallest size in bytes, with K, M or G for powers of 1024 [default: 4K; fusion: 64K a tensor]
    #[arg(short = 'b', long, value_name = "SIZE")]
    pub min_bytes: Option<Size>,

    /// Largest size [default: 256M; fusion: the smallest size]
    #[arg(short = 'e', long, value_name = "SIZE")]
    pub max_bytes: Option<Size>,

    /// Each size is so many times the one before
    #[arg(short = 'f', long, value_name = "N", default_value_t = 4)]
    pub factor: usize,

    /// Element type: f16, bf16, f32, f64, i8, i16, i32, i64, u8
    #[arg(long, default_value = "f32")]
    pub dtype: Type,

    /// How elements are combined: sum, average, min, max, product, adasum [default: sum]
    #[arg(long)]
    pub op: Option<Op>,

    /// What f32 and f64 elements are narrowed to on the wire, where they are combined
    #[arg(long, value_enum, default_value = "none")]
    pub compression: Narrow,

    /// What has to serve the operations; an error where it cannot
    #[arg(long, value_enum, default_value = "auto")]
    pub backend: BackendChoice,

    /// Whose memory the buffers are: the ranks' own, or memory that the runtime hands out and reduces in place
    #[arg(long, value_enum, default_value = "private")]
    pub buffer: BufferKind,

    /// Measured iterations a size [default: 50 up to 1M, 20 up to 16M, 7 above]
    #[arg(long, value_name = "N")]
    pub iters: Option<usize>,

    /// Iterations before those [default: 5 up to 16M, 2 above]
    #[arg(long, value_name = "N")]
    pub warmup: Option<usize>,

    /// Tensors that are under way at once in fusion [default: 200]
    #[arg(long, value_name = "N")]
    pub tensors: Option<usize>,

    /// Compare every element with a plain computation; wrong ones are counted and the exit code is 1
    #[arg(long)]
    pub check: bool,

    /// Afterwards submit nothing for so long, and tell how much of a core the busiest rank uses meanwhile
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub idle: Option<u64>,

    /// Print one JSON object a line instead of a table
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  mpirun -np 2 hvd-perf allreduce                      4 KiB to 256 MiB through shared memory
  mpirun -np 2 hvd-perf allreduce --backend tcp -e 1M  over TCP, up to 1 MiB
  mpirun -np 4 hvd-perf allgather --check              and is it right?
  mpirun -np 2 hvd-perf fusion                         200 tensors of 64 KiB at once
  HVD_RANK=0 HVD_SIZE=2 hvd-perf allreduce &           without a launcher
  HVD_RANK=1 HVD_SIZE=2 hvd-perf allreduce

Exit codes: 0 done, 1 failed or wrong elements, 2 wrong arguments.";

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Bench {
    /// One blocking allreduce in place.
    Allreduce,
    /// One blocking allgather of equal parts.
    Allgather,
    /// One blocking broadcast from rank 0.
    Broadcast,
    /// One blocking reducescatter.
    Reducescatter,
    /// One blocking alltoall of equal blocks.
    Alltoall,
    /// Many asynchronous allreduces, then a wait for all.
    Fusion,
}

impl Bench {
    /// Its name in reports.
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

/// What serves the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    /// Whatever the runtime picks.
    Auto,
    /// Shared memory.
    Shm,
    /// TCP.
    Tcp,
    /// The MPI plugin.
    Mpi,
}

/// Whose memory the buffers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BufferKind {
    /// Each rank's own.
    Private,
    /// Handed out by the runtime and reduced in place, where all ranks are on one host.
    Shared,
}

impl BufferKind {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            BufferKind::Private => "private",
            BufferKind::Shared => "shared",
        }
    }
}

/// [`Compression`] as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)] // Named as in `Compression`.
pub enum Narrow {
    None,
    Fp16,
    Bf16,
}

impl Narrow {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Narrow::None => "none",
            Narrow::Fp16 => "fp16",
            Narrow::Bf16 => "bf16",
        }
    }
}

impl From<Narrow> for Compression {
    fn from(narrow: Narrow) -> Self {
        match narrow {
            Narrow::None => Compression::None,
            Narrow::Fp16 => Compression::Fp16,
            Narrow::Bf16 => Compression::Bf16,
        }
    }
}

/// A number of bytes, written as `4096`, `4K`, `4KiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub usize);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            _ => return Err("expected a number of bytes such as 4096, 4K, 256M or 1G".into()),
        };
        let number: usize = digits.parse().map_err(|error| format!("{error}; expected a number such as 4K"))?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| "larger than all memory".into())
    }
}

/// [`DType`] as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Type(pub DType);

impl FromStr for Type {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = DType::ALL.into_iter().find(|dtype| *dtype != DType::Bool && dtype.to_string() == text);
        named.map(Type).ok_or_else(|| "expected f16, bf16, f32, f64, i8, i16, i32, i64 or u8".into())
    }
}

/// [`ReduceOp`] as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op(pub ReduceOp);

impl Op {
    /// Its name in reports.
    pub fn name(self) -> String {
        format!("{:?}", self.0).to_lowercase()
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use ReduceOp::{Adasum, Average, Max, Min, Product, Sum};
        let all = [Sum, Average, Min, Max, Product, Adasum];
        let named = all.into_iter().find(|&op| Op(op).name() == text);
        named.map(Op).ok_or_else(|| "expected sum, average, min, max, product or adasum".into())
    }
}

impl Args {
    /// The sizes to measure, in bytes; of fusion those of one tensor.
    pub fn sizes(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, last, factor) = (self.first(), self.last(), self.factor);
        std::iter::successors(Some(first), move |bytes| bytes.checked_mul(factor))
            .take_while(move |&bytes| bytes <= last)
    }

    /// Warm-up and measured iterations of an operation of `bytes`. As those of the other libraries' programs.
    pub fn repetitions(&self, bytes: usize) -> (usize, usize) {
        let (warmup, iterations) = match bytes {
            _ if self.bench == Bench::Fusion => (3, 20),
            _ if bytes <= 1 << 20 => (5, 50),
            _ if bytes <= 16 << 20 => (5, 20),
            _ => (2, 7),
        };
        (self.warmup.unwrap_or(warmup), self.iters.unwrap_or(iterations))
    }

    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// Arguments that fit nothing or not each other.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.factor >= 2, "--factor {}: sizes must grow; give at least 2", self.factor);
        ensure!(self.first() > 0, "--min-bytes 0: give at least 1");
        ensure!(
            self.first() <= self.last(),
            "--min-bytes {} is above --max-bytes {}; swap them",
            self.first(),
            self.last()
        );
        ensure!(self.iters != Some(0), "--iters 0 measures nothing; give at least 1");
        ensure!(self.tensors != Some(0), "--tensors 0 measures nothing; give at least 1");
        self.refuse_what_changes_nothing()?;
        ensure!(
            self.buffer == BufferKind::Private || matches!(self.bench, Bench::Allreduce | Bench::Fusion),
            "--buffer shared is for allreduce and fusion: nothing else is done in place"
        );
        ensure!(
            !self.reduces() || self.op().0.supports(self.dtype.0),
            "--op {} is not defined for --dtype {}",
            self.op().name(),
            self.dtype.0
        );
        Ok(())
    }

    fn refuse_what_changes_nothing(&self) -> Result<()> {
        let (bench, dtype) = (self.bench.name(), self.dtype.0);
        let compresses = self.compression != Narrow::None;
        let combined = "only allreduce, reducescatter and fusion combine elements; leave it out";
        ensure!(self.reduces() || self.op.is_none(), "--op changes nothing about {bench}: {combined}");
        ensure!(self.reduces() || !compresses, "--compression changes nothing about {bench}: {combined}");
        ensure!(
            !compresses || matches!(dtype, DType::F32 | DType::F64),
            "--compression changes nothing about --dtype {dtype}: it narrows f32 and f64; leave it out"
        );
        ensure!(
            self.bench == Bench::Fusion || self.tensors.is_none(),
            "--tensors changes nothing about {bench}: only fusion has several tensors; leave it out"
        );
        Ok(())
    }

    /// How elements are combined.
    pub(super) fn op(&self) -> Op {
        self.op.unwrap_or(Op(ReduceOp::Sum))
    }

    /// Tensors that are under way at once in fusion.
    pub(super) fn tensors(&self) -> usize {
        self.tensors.unwrap_or(200)
    }

    /// Refuses to measure one backend in place of another.
    pub(super) fn expect_backend(&self, got: Backend, ranks: usize) -> Result<()> {
        let expected = match self.backend {
            BackendChoice::Auto => return Ok(()),
            _ if ranks == 1 => return Ok(()),
            BackendChoice::Shm => Backend::Shm,
            BackendChoice::Tcp => Backend::Tcp,
            BackendChoice::Mpi => Backend::Mpi,
        };
        if got != expected {
            bail!("--backend {expected} was asked for, but {got} serves these ranks (are they all on one host?)");
        }
        Ok(())
    }

    /// Whether elements are combined.
    pub(super) fn reduces(&self) -> bool {
        matches!(self.bench, Bench::Allreduce | Bench::Reducescatter | Bench::Fusion)
    }

    fn first(&self) -> usize {
        let default = if self.bench == Bench::Fusion { 64 << 10 } else { 4 << 10 };
        self.min_bytes.map_or(default, |size| size.0)
    }

    fn last(&self) -> usize {
        let default = if self.bench == Bench::Fusion { self.first() } else { self.first().max(256 << 20) };
        self.max_bytes.map_or(default, |size| size.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Args {
        Args::parse_from(std::iter::once("hvd-perf").chain(line.split_whitespace()))
    }

    #[test]
    fn sizes_go_up_by_the_factor() {
        assert_eq!(args("allreduce -b 1K -e 20K").sizes().collect::<Vec<_>>(), [1024, 4096, 16384]);
        assert_eq!(args("allreduce -b 3 -e 3 -f 2").sizes().collect::<Vec<_>>(), [3]);
        assert_eq!(args("fusion").sizes().collect::<Vec<_>>(), [65536]);
        assert_eq!(args("allreduce").sizes().last(), Some(256 << 20));
    }

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in [("7", 7), ("4K", 4096), ("4KiB", 4096), ("2m", 2 << 20), ("1G", 1 << 30)] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "K", "4T", "-1", "1.5M", "99999999999G"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (line, name) in [
            ("allreduce -f 1", "--factor"),
            ("allreduce -b 0", "--min-bytes"),
            ("allreduce -b 2K -e 1K", "--max-bytes"),
            ("allreduce --iters 0", "--iters"),
            ("fusion --tensors 0", "--tensors"),
            ("broadcast --buffer shared", "--buffer"),
            ("allreduce --dtype u8 --op product", "--dtype"),
            ("allgather --compression fp16", "--compression"),
            ("alltoall --op sum", "--op"),
            ("broadcast --op max", "--op"),
            ("allreduce --dtype f16 --compression bf16", "--compression changes nothing about --dtype f16"),
            ("reducescatter --tensors 3", "--tensors"),
        ] {
            let error = args(line).validate().expect_err(line).to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn large_operations_are_repeated_less() {
        let args = args("allreduce --warmup 1");
        assert_eq!([1 << 20, 16 << 20, 64 << 20].map(|bytes| args.repetitions(bytes)), [(1, 50), (1, 20), (1, 7)]);
    }
}
