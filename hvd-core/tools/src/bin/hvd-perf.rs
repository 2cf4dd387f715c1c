//! Measures collectives; see `hvd-perf --help`.

use std::process::ExitCode;

use clap::Parser;
use hvd_tools::perf::{Args, run};

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(errors) => {
            eprintln!("hvd-perf: {errors} wrong elements");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("hvd-perf: {error:#}");
            ExitCode::FAILURE
        }
    }
}
