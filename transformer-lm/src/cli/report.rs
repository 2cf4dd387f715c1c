//! `lm report`.

use std::path::PathBuf;

use clap::Parser;

use crate::Result;
use crate::report::report;
use crate::stdout::say;

/// Draw the curves of one or several runs into one HTML page, and into a PNG beside it
#[derive(Parser, Debug)]
pub struct ReportArgs {
    /// Folders with metrics.jsonl or metrics.csv
    #[arg(required = true, value_name = "RUN_DIR")]
    runs: Vec<PathBuf>,

    /// The page to write; the picture has its name with .png
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    output: PathBuf,
}

/// Runs `lm report`.
///
/// # Errors
/// Of [`report`].
pub fn run(args: ReportArgs) -> Result<()> {
    let picture = report(&args.runs, &args.output)?;
    say(&format!("{}\n{}\n", args.output.display(), picture.display()))
}
