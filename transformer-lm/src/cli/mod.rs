//! The command lines. Exit codes: 0 success, 1 failure, 2 a mistake in flags or configuration.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::stdout::has_no_reader;
use crate::{Error, Result};

mod benchmark;
pub mod evaluate;
pub mod generate;
pub mod interchange;
pub mod prepare;
pub mod report;
pub mod train;

pub use evaluate::EvaluateArgs;
pub use generate::GenerateArgs;
pub use interchange::{ExportArgs, ImportArgs};
pub use prepare::PrepareArgs;
pub use report::ReportArgs;
pub use train::TrainArgs;

/// Train a GPT on several processes and let it speak.
#[derive(Parser, Debug)]
#[command(name = "lm", version)]
pub struct Lm {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Prepare(PrepareArgs),
    Train(TrainArgs),
    Generate(GenerateArgs),
    Evaluate(EvaluateArgs),
    Report(ReportArgs),
    Export(ExportArgs),
    Import(ImportArgs),
}

/// Runs `lm` with its subcommands.
pub fn run(lm: Lm) -> Result<()> {
    match lm.command {
        Command::Prepare(args) => prepare::run(args),
        Command::Train(args) => train::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Evaluate(args) => evaluate::run(args),
        Command::Report(args) => report::run(args),
        Command::Export(args) => interchange::export(args),
        Command::Import(args) => interchange::import(args),
    }
}

/// What each binary's `main` does: parse the process's arguments, run, report, and give the exit code. A reader of standard output
/// that goes away early is no failure.
pub fn main_of<A: Parser>(run: impl FnOnce(A) -> Result<()>) -> ExitCode {
    let args = match A::try_parse_from(with_dashes(std::env::args_os())) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if has_no_reader(&error) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// Prints `error: …` to stderr and gives the error's exit code. A mistake that all ranks make is said by one.
pub fn report(error: &Error) -> ExitCode {
    if !matches!(error, Error::Config(_)) || crate::trainer::launched_rank() == 0 {
        let text = format!("error: {error}\n"); // in one piece, as several ranks share the terminal
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    ExitCode::from(error.exit_code())
}

/// Flags may be written with `_`, as the reference does, or with `-`: the names of long flags up to `=` get dashes.
pub fn with_dashes(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut flags = true;
    args.into_iter()
        .map(|arg| {
            flags &= arg != "--";
            match arg.to_str() {
                Some(text) if flags && text.starts_with("--") => {
                    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                    format!("{}{value}", name.replace('_', "-")).into()
                }
                _ => arg,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dashed(args: &[&str]) -> Vec<String> {
        with_dashes(args.iter().map(OsString::from))
            .into_iter()
            .map(|arg| arg.into_string().unwrap_or_default())
            .collect()
    }

    #[test]
    fn flags_may_have_underscores_but_values_keep_theirs() {
        let args =
            ["train", "--run_name", "my_run", "--output_dir=a_b", "--set", "training.max_steps=3", "--", "--as_is"];
        let expected =
            ["train", "--run-name", "my_run", "--output-dir=a_b", "--set", "training.max_steps=3", "--", "--as_is"];
        assert_eq!(dashed(&args), expected);
    }

    #[test]
    fn command_lines_are_consistent() {
        use clap::CommandFactory;
        Lm::command().debug_assert(); // with every subcommand
        TrainArgs::command().debug_assert();
    }
}
