//! `lm generate`.

use clap::Parser;

use crate::{Error, Result};

/// Generate (not written yet).
#[derive(Parser, Debug)]
pub struct GenerateArgs {}

/// Runs `lm generate`.
pub fn run(_args: GenerateArgs) -> Result<()> {
    Err(Error::Training("not written yet".into()))
}
