//! The flags of `train --benchmark`.

use std::num::NonZeroUsize;

use clap::{Args, ValueEnum};

use crate::Result;
use crate::config::AmpDtype;
use crate::metrics::count;
use crate::stdout::say;
use crate::trainer::{Benchmark, Measured, Preset, setup_horovod};

/// Measures updates on random tokens instead of training.
#[derive(Args, Debug)]
pub(super) struct BenchmarkArgs {
    /// Times updates of a preset model on random tokens and prints the median; reads and writes no files
    #[arg(long, conflicts_with_all = ["config", "resume", "dry_run", "print_config", "overfit_one_batch", "overrides", "profile"])]
    benchmark: bool,

    /// Shape of the model that is timed
    #[arg(long, value_enum, default_value = "small", requires = "benchmark", help_heading = "Benchmark")]
    preset: Preset,

    /// Precision of its arithmetic
    #[arg(long, value_enum, default_value = "float32", requires = "benchmark", help_heading = "Benchmark")]
    dtype: Dtype,

    /// Threads of a rank [default: as in training]
    #[arg(long, value_name = "N", requires = "benchmark", help_heading = "Benchmark")]
    threads: Option<NonZeroUsize>,

    /// Sequences per rank and update [default: the preset's]
    #[arg(long, value_name = "N", requires = "benchmark", help_heading = "Benchmark")]
    batch: Option<NonZeroUsize>,

    /// Updates that are timed
    #[arg(long, value_name = "N", default_value = "10", requires = "benchmark", help_heading = "Benchmark")]
    steps: NonZeroUsize,

    /// Updates before them
    #[arg(long, value_name = "N", default_value = "3", requires = "benchmark", help_heading = "Benchmark")]
    warmup: usize,

    /// Prints one line of JSON
    #[arg(long, requires = "benchmark", help_heading = "Benchmark")]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Float32,
    Bfloat16,
}

impl BenchmarkArgs {
    pub(super) fn is_asked(&self) -> bool {
        self.benchmark
    }

    pub(super) fn run(&self) -> Result<()> {
        let mut setup = setup_horovod(false)?;
        if let Some(threads) = self.threads {
            tch::set_num_threads(i32::try_from(threads.get()).unwrap_or(i32::MAX));
            setup.threads = threads.get();
        }
        crate::memory::keep_freed_memory();
        let measured = self.what().run(&setup).inspect_err(|error| setup.world.abort(&error.to_string()))?;
        hvd_torch::shutdown().map_err(hvd_torch::Error::from)?;
        if setup.rank == 0 { say(&format!("{}\n", self.show(&measured))) } else { Ok(()) }
    }

    fn what(&self) -> Benchmark {
        let dtype = match self.dtype {
            Dtype::Float32 => AmpDtype::Fp32,
            Dtype::Bfloat16 => AmpDtype::Bf16,
        };
        let (batch, steps) = (self.batch.map(NonZeroUsize::get), self.steps.get());
        Benchmark { preset: self.preset, dtype, batch, steps, warmup: self.warmup }
    }

    fn show(&self, measured: &Measured) -> String {
        if self.json {
            return serde_json::to_string(measured).unwrap_or_default();
        }
        let Measured { preset, dtype, products, ranks, threads, batch, step_ms, tokens_per_s, loss, waiting } =
            measured;
        let (ranks, threads, batch) = (count(*ranks, "rank"), count(*threads, "thread"), count(*batch, "sequence"));
        format!(
            "{preset} {dtype} (products in {products}), {ranks} of {threads}, {batch} each: {step_ms:.1} ms per update, \
             {tokens_per_s:.0} tokens/s, {:.1} % of the time waiting; loss {loss:.4}",
            100.0 * waiting
        )
    }
}
