//! Time and bandwidth of named operations, as the engine carries them out.
//!
//! Measured as other libraries are in `benches/peers`: before each iteration the buffer is filled anew and a barrier passed
//! twice, so that nobody is just waking up; an iteration's time is that of its slowest rank; the median over the
//! iterations counts.

mod args;
mod buffer;
mod case;
mod check;
mod report;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hvd_core::config::{Config, TransportChoice};
use hvd_core::{DType, Element, ReduceOp, World};

pub use args::{Args, BackendChoice, Bench, BufferKind};
use case::Case;
use check::Value;
use half::{bf16, f16};
use nix::time::{ClockId, clock_gettime};
use report::{Idle, Report, Row};

/// Measures what `args`, which are [`Args::validate`]d, ask for and prints it on rank 0. Gives the number of wrong elements on all ranks.
///
/// # Errors
/// A world that does not come up, and whatever an operation fails with.
pub fn run(args: &Args) -> Result<u64> {
    let world = World::with_config(config(args)?).context("the ranks did not come together")?;
    args.expect_backend(world.backend(), world.size())?;
    let errors = match args.dtype.0 {
        DType::F16 => sweep::<f16>(&world, args),
        DType::BF16 => sweep::<bf16>(&world, args),
        DType::F32 => sweep::<f32>(&world, args),
        DType::F64 => sweep::<f64>(&world, args),
        DType::I32 => sweep::<i32>(&world, args),
        DType::I64 => sweep::<i64>(&world, args),
        DType::U8 => sweep::<u8>(&world, args),
        DType::I8 => sweep::<i8>(&world, args),
        DType::I16 => sweep::<i16>(&world, args),
        DType::Bool => anyhow::bail!("bool has no arithmetic to measure; take --dtype u8"),
    }?;
    world.shutdown()?;
    Ok(errors)
}

/// The environment's settings, with the backend that was asked for.
fn config(args: &Args) -> Result<Config> {
    let mut config = Config::from_env()?;
    match args.backend {
        BackendChoice::Auto => {}
        BackendChoice::Shm => config.shared_memory = true,
        BackendChoice::Tcp => (config.shared_memory, config.transport) = (false, TransportChoice::Tcp),
        BackendChoice::Mpi => (config.shared_memory, config.transport) = (false, TransportChoice::Mpi),
    }
    Ok(config)
}

fn sweep<T: Value + Element>(world: &World, args: &Args) -> Result<u64> {
    let report = Report::new(world, args)?;
    let mut errors = 0;
    for bytes in args.sizes() {
        let mut case = Case::<T>::new(world, args, bytes)?;
        let (seconds, wrong) = measure(world, args, &mut case)?;
        report.row(&Row::new(world, args, &case, &seconds, args.check.then_some(wrong)))?;
        errors += wrong;
    }
    if let Some(seconds) = args.idle {
        report.idle(&Idle::new(world, seconds, share_while_idle(world, Duration::from_secs(seconds))?))?;
    }
    Ok(errors)
}

/// What the busiest rank uses of a core while nothing is submitted for `time`. All ranks must call it.
///
/// # Errors
/// A lost world, or a clock that cannot be read.
pub fn share_while_idle(world: &World, time: Duration) -> Result<f64> {
    world.barrier()?;
    let before = processor_time()?;
    std::thread::sleep(time);
    let mut share = [(processor_time()? - before).as_secs_f64() / time.as_secs_f64()];
    world.allreduce("hvd-perf.idle", &mut share, ReduceOp::Max)?;
    Ok(share[0])
}

/// The processor time that all threads of this process have used.
fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// Times of the slowest rank, ascending, in seconds; and the wrong elements of all ranks.
fn measure<T: Value>(world: &World, args: &Args, case: &mut Case<'_, T>) -> Result<(Vec<f64>, u64)> {
    let (warmup, iterations) = args.repetitions(case.bytes());
    let mut seconds = Vec::with_capacity(iterations);
    let mut wrong = 0;
    for _ in 0..warmup {
        once(world, case)?;
    }
    for _ in 0..iterations {
        seconds.push(once(world, case)?.as_secs_f64());
        wrong += if args.check { case.errors() } else { 0 };
    }
    let mut wrong = [wrong as i64];
    world.allreduce("hvd-perf.slowest", &mut seconds, ReduceOp::Max)?;
    world.allreduce("hvd-perf.wrong", &mut wrong, ReduceOp::Sum)?;
    ensure!(seconds.iter().all(|time| time.is_finite()), "a time came back as no number");
    seconds.sort_by(f64::total_cmp);
    Ok((seconds, wrong[0] as u64))
}

fn once<T: Value>(world: &World, case: &mut Case<'_, T>) -> Result<Duration> {
    case.refill();
    // A rank that waited for long was asleep at the first barrier, and its waking is not part of the operation.
    world.barrier()?;
    world.barrier()?;
    let start = Instant::now();
    case.run()?;
    Ok(start.elapsed())
}
