//! `train` and `lm train`.

use std::path::PathBuf;

use clap::Parser;

use super::benchmark::BenchmarkArgs;
use crate::Result;
use crate::config::{Config, PathsSection};
use crate::stdout::say;
use crate::trainer::{Resume, forecast, launched_rank, run_distributed_training, setup_horovod};

const EXAMPLES: &str = "\
Examples:
  lm prepare --input mine.txt --tokenizer byte --output data/mine      once: text to tokens
  train --config configs/demo.yaml                                     one process, all cores
  mpirun -np 2 train --config configs/demo.yaml --run-name demo        two processes
  mpirun -np 2 train --config configs/demo.yaml --run-name demo --resume auto
                                                                       go on after a kill, at the very step
  train --config configs/demo.yaml --set training.max_steps=100 --set data.data_dir=data/mine
  train --config configs/demo.yaml --print-config                      every key with its value
  train --config configs/gpt2-124m.yaml --dry-run                      what it would take
  train --config configs/demo.yaml --set training.max_steps=20 --profile trace.json
  train --benchmark --preset small --threads 2                         how fast an update is

With Open MPI, mpirun wants --oversubscribe for more ranks than cores, and as root --allow-run-as-root.
OMP_NUM_THREADS sets the threads of a rank; otherwise the ranks of a host share its cores.

Exit codes: 0 success; 1 training failed; 2 a mistake in flags, configuration or batch sizes.";

/// Train a GPT on as many processes as the launcher starts
#[derive(Parser, Debug)]
#[command(name = "train", version, after_help = EXAMPLES)]
pub struct TrainArgs {
    /// YAML file with sections model, training, data, generation, paths, distributed
    #[arg(long, value_name = "FILE", default_value = "configs/config.yaml")]
    config: PathBuf,

    /// Checkpoint or run folder to go on from; `auto`: the newest whole checkpoint of the newest run of this name
    #[arg(long, value_name = "PATH|auto")]
    resume: Option<String>,

    /// Name of the run; its folder is <timestamp>_<run name>
    #[arg(long, value_name = "NAME", default_value = "gpt")]
    run_name: String,

    /// Folder that holds the runs' folders; overrides the section paths
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,

    /// Overrides one key of the configuration; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,

    /// Prints the configuration with every key and exits
    #[arg(long)]
    print_config: bool,

    /// Prints the plan (parameters, memory, tokens, updates, estimated time) and exits; writes nothing
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,

    /// Trains on the first global batch again and again: a model and settings that are sound bring its loss near 0
    #[arg(long, conflicts_with = "resume")]
    overfit_one_batch: bool,

    /// Writes what each update's time goes to on all ranks, about 5 kB for each, for https://ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,

    #[command(flatten)]
    benchmark: BenchmarkArgs,
}

/// Runs `train`.
///
/// # Errors
/// Of [`Config::load`] and [`run_distributed_training`].
pub fn run(args: TrainArgs) -> Result<()> {
    if args.benchmark.is_asked() {
        return args.benchmark.run();
    }
    let mut config = Config::load(Some(&args.config), &args.overrides)?;
    if let Some(folder) = args.output_dir {
        config.paths = PathsSection { checkpoint_dir: folder, ..Default::default() };
    }
    config.training.overfit_one_batch |= args.overfit_one_batch;
    config.training.profile = args.profile.or(config.training.profile);
    if args.print_config {
        return if launched_rank() == 0 { say(&config.to_yaml()) } else { Ok(()) };
    }
    if args.dry_run {
        return plan(&config);
    }
    let resume = args.resume.as_deref().map(Resume::from);
    run_distributed_training(&config, resume.as_ref(), &args.run_name).map(drop)
}

fn plan(config: &Config) -> Result<()> {
    let setup = setup_horovod(false)?;
    let forecast = forecast(config, &setup).inspect_err(|error| setup.world.abort(&error.to_string()))?;
    hvd_torch::shutdown().map_err(hvd_torch::Error::from)?;
    if setup.rank == 0 { say(&format!("{forecast}\n")) } else { Ok(()) }
}
