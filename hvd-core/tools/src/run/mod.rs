//! `hvdrun`: starts a program as several ranks and watches over them.
//!
//! `hvdrun` starts an *agent* on each host, itself with another argument: directly on this host, through `ssh` on others.
//! An agent starts the ranks of its host, passes their output on and ends them when `hvdrun` tells it to or is gone. So
//! hosts near and far are treated alike, and nobody outlives anybody:
//!
//! | who dies | what happens |
//! |---|---|
//! | a rank | the agent says so; the others get a few seconds to say why they end, then SIGTERM, then SIGKILL |
//! | an agent | the kernel kills its ranks (`PR_SET_PDEATHSIG`); `hvdrun` sees the end of its output and ends the rest |
//! | `ssh`, the connection | the agent sees the end of its input and ends its ranks; `hvdrun` as above |
//! | `hvdrun` | all agents see the end of their input |
//!
//! The secret of the job travels through the agents' stdin into the environment of the ranks; no command line shows it.
//! On several hosts rank 0's agent finds an address that the others reach and holds a free port for it.

mod address;
mod agent;
mod args;
mod build;
mod connection;
mod environment;
mod events;
mod horovod;
mod hosts;
mod job;
mod message;
mod options;
mod output;
mod plan;
mod process;
mod report;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use args::Args;
use job::Job;
use plan::Plan;

/// What the binary does with its arguments, the first of which is its own name. Gives the exit code, which the help
/// explains.
pub fn main(args: Vec<OsString>) -> ExitCode {
    if args.get(1).is_some_and(|arg| arg == connection::AGENT_FLAG) {
        return finish(agent::serve().map(|()| 0));
    }
    let mut notes = Vec::new();
    let args = match args::normalised(args, &mut notes) {
        Ok(args) => args,
        Err(hint) => {
            eprintln!("hvdrun: {hint}");
            return ExitCode::from(report::USAGE);
        }
    };
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { report::USAGE } else { 0 });
        }
    };
    notes.iter().for_each(|note| eprintln!("hvdrun: {note}"));
    if args.check_build {
        print!("{}", build::describe());
        return ExitCode::SUCCESS;
    }
    match prepare(args) {
        Ok(job) => finish(job.and_then(Job::run)),
        Err(error) => {
            eprintln!("hvdrun: {error:#}");
            ExitCode::from(report::USAGE)
        }
    }
}

/// Reads what the user wants; starts it. The outer error is the user's.
fn prepare(args: Args) -> Result<Result<Job>> {
    let mut options = match &args.config_file {
        Some(path) => args.options.over_file(path)?,
        None => args.options,
    };
    options.ssh_command = options.ssh_command.or_else(|| std::env::var("HVD_SSH").ok()).filter(|text| !text.is_empty());
    options.start_timeout().and(options.grace())?;
    options.variables()?;
    let plan = Plan::new(options.num_proc, options.hosts()?)?;
    args.command.first().context("which program? It comes after the options: `hvdrun -np 2 ./train …`")?;
    Ok(Job::start(plan, options, args.command))
}

fn finish(code: Result<u8>) -> ExitCode {
    ExitCode::from(code.unwrap_or_else(|error| {
        eprintln!("hvdrun: {error:#}");
        report::OWN_FAILURE
    }))
}
