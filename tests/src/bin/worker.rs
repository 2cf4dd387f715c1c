//! One rank of the jobs that the tests start. Every command checks what it gets and ends with a code other than 0 when
//! something is wrong.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use hvd_core::{Allreduce, Compression, ReduceOp, World};
use hvd_tests::conformance;
use rustix::process::Signal;

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
        #[arg(long, default_value_t = 25)]
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
    /// Rank 0 submits in a process set of ranks 0 and 1 what the others submit in the world.
    Astray,
    /// Does for ever what keeps one phase of the runtime busy; says `busy`.
    Busy {
        #[arg(long)]
        phase: Phase,
    },
    /// Says `busy`; then all ranks shut down at once, while a blow falls on one of them.
    Farewell {
        /// They begin when this file is there.
        #[arg(long)]
        until: PathBuf,
        /// Who is struck.
        #[arg(long)]
        victim: usize,
        /// A signal, `KILL` or `STOP`, or a command that cuts it off.
        #[arg(long)]
        blow: String,
        /// When it strikes, from when all ranks are there.
        #[arg(long)]
        blow_after_us: u64,
        /// When the victim wants to shut down, from then on; the others do at once.
        #[arg(long)]
        leave_after_us: u64,
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
            let (shm, tcp, mpi) = (world.shm_enabled(), world.tcp_enabled(), world.mpi_enabled());
            let enabled = [("shm", shm), ("tcp", tcp), ("mpi", mpi), ("hierarchical", shm && (tcp || mpi))];
            let says = enabled.iter().any(|(name, enabled)| *name == backend && *enabled);
            ensure!(says || world.size() == 1, "{backend} is not among what is said to be enabled: {enabled:?}");
            conformance::run(&world, seed, cases)?;
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
        Command::Astray => astray(&world)?,
        Command::Farewell { until, victim, blow, blow_after_us, leave_after_us } => {
            let [blow_after, leave_after] = [blow_after_us, leave_after_us].map(Duration::from_micros);
            farewell(&world, &until, (world.rank() == victim).then_some((blow, blow_after, leave_after)))?;
        }
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
        wait_for(&file);
    }
    // One that is known from the steps before, and a new one.
    for handle in ["steps", "fresh"].map(|name| world.allreduce_async(name, vec![1.0f32; 10], ReduceOp::Sum)) {
        ensure!(handle?.wait()? == vec![world.size() as f32; 10], "a wrong sum");
    }
    Ok(())
}

fn wait_for(file: &Path) {
    while !file.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `struck`: what falls on this rank, when, and when it wants to shut down.
fn farewell(world: &World, until: &Path, struck: Option<(String, Duration, Duration)>) -> Result<()> {
    steps(world, 3, 1000)?;
    println!("busy");
    wait_for(until);
    world.barrier()?;
    let begin = Instant::now();
    let Some((blow, blow_after, leave_after)) = struck else { return Ok(world.shutdown()?) };
    let blow = std::thread::spawn(move || {
        pass(begin + blow_after);
        strike(&blow)
    });
    pass(begin + leave_after);
    let ended = world.shutdown();
    blow.join().expect("the blow falls")?;
    Ok(ended?)
}

/// To the microsecond, as no sleep is.
fn pass(until: Instant) {
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

fn strike(blow: &str) -> Result<()> {
    let own = rustix::process::getpid();
    match blow {
        "KILL" => rustix::process::kill_process(own, Signal::KILL)?,
        "STOP" => rustix::process::kill_process(own, Signal::STOP)?,
        command => ensure!(hvd_tests::run(command), "`{command}` failed"),
    }
    Ok(())
}

/// Rank 0 submits in a process set what the others submit in the world.
fn astray(world: &World) -> Result<()> {
    let set = world.process_set(&[0, 1])?;
    let mut handle = match (&set, world.rank()) {
        (Some(set), 0) => Some(set.allreduce_async("astray", vec![1.0f32], ReduceOp::Sum)?),
        _ => None,
    };
    world.barrier()?; // from here on the others can know of it
    if handle.is_none() {
        handle = Some(world.allreduce_async("astray", vec![1.0f32], ReduceOp::Sum)?);
    }
    handle.map_or(Ok(()), |handle| Ok(handle.wait().map(drop)?))
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
