//! `lm prepare`.

use clap::Parser;

use crate::{Error, Result};

/// Prepare (not written yet).
#[derive(Parser, Debug)]
pub struct PrepareArgs {}

/// Runs `lm prepare`.
pub fn run(_args: PrepareArgs) -> Result<()> {
    Err(Error::Training("not written yet".into()))
}
