//! `lm export` and `lm import`.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::Result;
use crate::config::VocabSize;
use crate::interchange::{Imported, export_hf, import_hf};
use crate::stdout::say;

/// A format of other programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A folder of Hugging Face's transformers, as GPT-2
    Hf,
}

const EXPORT_EXAMPLES: &str = "\
Example:
  lm export --format hf --checkpoint runs/20260101_120000_demo --output demo-hf
  python3 -c 'from transformers import pipeline; print(pipeline(\"text-generation\", \"demo-hf\")(\"ROMEO.\"))'";

/// Write a checkpoint's model and tokenizer for other programs
#[derive(Parser, Debug)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct ExportArgs {
    /// The other program's format
    #[arg(long, value_enum, default_value = "hf")]
    format: Format,

    /// A checkpoint, or a run's folder: then its best checkpoint, else its newest
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// The folder to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

const IMPORT_EXAMPLES: &str = "\
Example:
  lm import --format hf --input gpt2 --output models/gpt2      the folder of a GPT-2, any size
  generate --checkpoint models/gpt2 --prompt 'Once upon a time'
  lm prepare --input mine.txt --tokenizer gpt2 --output data/mine
  train --config configs/finetune.yaml --run-name mine --set training.init_from=models/gpt2";

/// Make a checkpoint of another program's model
#[derive(Parser, Debug)]
#[command(after_help = IMPORT_EXAMPLES)]
pub struct ImportArgs {
    /// The other program's format
    #[arg(long, value_enum, default_value = "hf")]
    format: Format,

    /// The folder with config.json and model.safetensors
    #[arg(long, value_name = "DIR")]
    input: PathBuf,

    /// The checkpoint to make
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Runs `lm export`.
///
/// # Errors
/// Of [`export_hf`].
pub fn export(args: ExportArgs) -> Result<()> {
    let Format::Hf = args.format;
    let shape = export_hf(&args.checkpoint, &args.output)?;
    say(&format!("{}: a GPT-2 of {} parameters\n", args.output.display(), shape.parameter_count()))
}

/// Runs `lm import`.
///
/// # Errors
/// Of [`import_hf`].
pub fn import(args: ImportArgs) -> Result<()> {
    let Format::Hf = args.format;
    say(&format!("{}: {}\n", args.output.display(), describe(&import_hf(&args.input, &args.output)?)))
}

/// The section `model` of a configuration that goes on from it, the tokenizer, and notes.
fn describe(imported: &Imported) -> String {
    let model = &imported.model;
    let vocabulary = match model.vocab_size {
        VocabSize::Fixed(size) => size.to_string(),
        VocabSize::Auto => "auto".into(),
    };
    let padding = model.pad_token_id.map_or("null".into(), |token| token.to_string());
    let tokenizer = imported.tokenizer.as_ref().map_or("none", |tokenizer| tokenizer.name());
    let mut text = format!(
        "model: {{d_model: {}, n_heads: {}, n_layers: {}, d_ff: {}, dropout: {}, max_seq_len: {}, vocab_size: {vocabulary}, \
         pad_token_id: {padding}}}, tokenizer {tokenizer}",
        model.d_model, model.n_heads, model.n_layers, model.d_ff, model.dropout, model.max_seq_len
    );
    imported.notes.iter().for_each(|note| text += &format!("\nnote: {note}"));
    text
}
