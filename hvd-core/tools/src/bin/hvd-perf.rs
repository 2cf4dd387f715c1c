//! Measures collectives; see `hvd-perf --help`.

use std::process::ExitCode;

use clap::Parser;
use hvd_tools::perf::{Args, run};

/// Exit code for wrong arguments, as clap's.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = args.validate() {
        eprintln!("hvd-perf: {error}");
        return ExitCode::from(USAGE);
    }
    match run(&args) {
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
