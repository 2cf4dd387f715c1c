//! `train`: the same as `lm train`.

use std::process::ExitCode;

use transformer_lm::cli;

fn main() -> ExitCode {
    hvd_torch::load_cuda();
    cli::main_of::<cli::TrainArgs>(cli::train::run)
}
