//! `lm train`.

use clap::Parser;

use crate::{Error, Result};

/// Train (not written yet).
#[derive(Parser, Debug)]
pub struct TrainArgs {}

/// Runs `lm train`.
pub fn run(_args: TrainArgs) -> Result<()> {
    Err(Error::Training("not written yet".into()))
}
