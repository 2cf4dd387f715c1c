//! `lm prepare`, `lm train`, `lm generate`, `lm evaluate`, `lm report`.

use std::process::ExitCode;

use transformer_lm::cli;

fn main() -> ExitCode {
    hvd_torch::load_cuda();
    cli::main_of::<cli::Lm>(cli::run)
}
