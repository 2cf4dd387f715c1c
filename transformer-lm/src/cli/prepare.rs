//! `lm prepare`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Parser;

use crate::data::{PrepareOptions, PrepareSummary, TokenizerKind, Verified, prepare, verify};
use crate::metrics::count;
use crate::stdout::say;
use crate::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  lm prepare --input mine.txt --tokenizer char --output data/mine
  lm prepare --input books/ 'news/**/*.jsonl' --field body --tokenizer bpe --vocab-size 16384 --output data/mine
  lm prepare --verify --output data/mine                     read a prepared folder back";

/// Turn text files into tokens to train on.
#[derive(Parser, Debug)]
#[command(after_help = EXAMPLES)]
pub struct PrepareArgs {
    /// Files, folders (all .txt and .jsonl files below) or quoted patterns; read in the order of their names. Each line of a
    /// .jsonl file is a document, every other file is one
    #[arg(long, required_unless_present = "verify", num_args = 1.., value_name = "PATH")]
    input: Vec<PathBuf>,

    /// The field of .jsonl files that holds the text
    #[arg(long, default_value = "text", value_name = "NAME")]
    field: String,

    /// How text becomes tokens
    #[arg(long, value_enum, default_value = "byte")]
    tokenizer: TokenizerKind,

    /// Tokens that --tokenizer bpe learns [default: 8192]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    vocab_size: Option<usize>,

    /// The folder to make: train.bin, val.bin, tokenizer.json
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// Share of the tokens, the last ones, that is held out for validation
    #[arg(long, default_value_t = 0.1, value_name = "SHARE", allow_negative_numbers = true)]
    val_fraction: f64,

    /// Most tokens in a file; a part that has more is cut into several shards
    #[arg(long, default_value_t = PrepareOptions::default().shard_tokens, value_name = "N", allow_negative_numbers = true)]
    shard_tokens: u64,

    /// Threads that encode [default: all cores]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    threads: Option<NonZeroUsize>,

    /// Read everything back and compare it with the text; without --input, check what is in --output
    #[arg(long)]
    verify: bool,

    /// Replace the output folder if it holds prepared data (nothing else is ever replaced)
    #[arg(long)]
    overwrite: bool,
}

/// Runs `lm prepare`.
pub fn run(args: PrepareArgs) -> Result<()> {
    let output = args.output.clone();
    let (check, makes) = (args.verify, !args.input.is_empty());
    let made = if makes { Some(make(args)?) } else { None };
    if check {
        say(&format!("{}\n", describe_verified(&read_back(&output, made.as_ref())?)))?;
    }
    Ok(())
}

fn make(args: PrepareArgs) -> Result<PrepareSummary> {
    if args.vocab_size.is_some() && args.tokenizer != TokenizerKind::Bpe {
        return Err(Error::Config("--vocab-size: only --tokenizer bpe has a choice of vocabularies".into()));
    }
    let defaults = PrepareOptions::default();
    let options = PrepareOptions {
        input: args.input,
        field: args.field,
        tokenizer: args.tokenizer,
        vocab_size: args.vocab_size.unwrap_or(defaults.vocab_size),
        output: args.output,
        val_fraction: args.val_fraction,
        shard_tokens: args.shard_tokens,
        threads: args.threads.map_or(defaults.threads, NonZeroUsize::get),
        overwrite: args.overwrite,
        progress: true,
    };
    let summary = prepare(&options)?;
    say(&format!("{}\n", describe(&summary, &options))).map(|()| summary)
}

/// Reads the folder, whose text must be the one that was prepared, where that is known.
fn read_back(folder: &Path, made: Option<&PrepareSummary>) -> Result<Verified> {
    let verified = verify(folder)?;
    match made {
        Some(made) if made.checksum != verified.checksum => {
            Err(Error::data(folder, "its tokens do not stand for the text that was read; prepare it again"))
        }
        _ => Ok(verified),
    }
}

fn describe(summary: &PrepareSummary, options: &PrepareOptions) -> String {
    let PrepareSummary { files, documents, bytes, train_tokens, val_tokens, vocab_size, tokenizer, .. } = summary;
    let tokens = train_tokens + val_tokens;
    let output = options.output.display();
    let (files, documents) = (count(*files, "file"), count(*documents as usize, "document"));
    let asked = options.vocab_size;
    let note = match options.tokenizer {
        TokenizerKind::Bpe if *vocab_size < asked => {
            format!("\nnote: the text has too few different pairs for the {asked} tokens asked for")
        }
        _ => String::new(),
    };
    format!(
        "{files}, {documents}, {bytes} bytes, {tokens} tokens ({tokenizer}, vocabulary {vocab_size})\n\
         {output}: {train_tokens} tokens to train on, {val_tokens} held out{note}"
    )
}

fn describe_verified(verified: &Verified) -> String {
    let Verified { train_tokens, val_tokens, shards, bytes, checksum } = verified;
    let shards = count(*shards, "shard");
    format!("verified: {shards}, {train_tokens} + {val_tokens} tokens, {bytes} bytes of text (CRC-32 {checksum:08x})")
}
