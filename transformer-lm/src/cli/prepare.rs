//! `lm prepare`.

use std::path::PathBuf;

use clap::Parser;

use crate::Result;
use crate::data::{PrepareOptions, PrepareSummary, TokenizerKind, prepare};

/// Turn text files into tokens to train on.
#[derive(Parser, Debug)]
pub struct PrepareArgs {
    /// Text files; they are read in the order of their names
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,

    /// How text becomes tokens
    #[arg(long, value_enum, default_value = "byte")]
    tokenizer: TokenizerKind,

    /// The folder to make: train.bin, val.bin, tokenizer.json
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// Share of the tokens, the last ones, that is held out for validation
    #[arg(long, default_value_t = 0.1, value_name = "SHARE")]
    val_fraction: f64,

    /// Replace the output folder if it holds prepared data (nothing else is ever replaced)
    #[arg(long)]
    overwrite: bool,
}

/// Runs `lm prepare`.
pub fn run(args: PrepareArgs) -> Result<()> {
    let options = PrepareOptions {
        input: args.input,
        tokenizer: args.tokenizer,
        output: args.output,
        val_fraction: args.val_fraction,
        overwrite: args.overwrite,
        progress: true,
    };
    println!("{}", describe(&prepare(&options)?, &options));
    Ok(())
}

fn describe(summary: &PrepareSummary, options: &PrepareOptions) -> String {
    let PrepareSummary { files, bytes, train_tokens, val_tokens, vocab_size, tokenizer } = summary;
    let tokens = train_tokens + val_tokens;
    let output = options.output.display();
    let plural = if *files == 1 { "" } else { "s" };
    format!(
        "{files} file{plural}, {bytes} bytes, {tokens} tokens ({tokenizer}, vocabulary {vocab_size})\n\
         {output}: {train_tokens} tokens to train on, {val_tokens} held out"
    )
}
