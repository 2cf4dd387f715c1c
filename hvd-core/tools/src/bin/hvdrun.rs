//! Starts a program as several ranks; see `hvdrun --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    hvd_tools::run::main(std::env::args_os().collect())
}
