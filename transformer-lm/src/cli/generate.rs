//! `generate` and `lm generate`.

use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};
use std::path::{Path, PathBuf};

use clap::Parser;
use tch::Device;

use crate::checkpoint::{resolve, write_atomically};
use crate::config::DeviceChoice;
use crate::data::Tokenizer;
use crate::generate::{TextParams, generate_text, interactive_generation, load_model_for_generation, stream_text};
use crate::model::TransformerLM;
use crate::model::sampling::Sampling;
use crate::{Config, Error, Result};

const EXAMPLES: &str = "\
Examples:
  generate --checkpoint runs/20260101_120000_demo --prompt 'ROMEO:'
  generate --checkpoint runs/20260101_120000_demo/best_model --interactive
  generate --checkpoint model --prompt 'Once' --num-samples 3 --seed 7 --output texts.txt

Exit codes: 0 success; 1 failure; 2 a mistake in flags or settings.";

/// Lets a trained model continue a text
#[derive(Parser, Debug)]
#[command(name = "generate", version, after_help = EXAMPLES)]
pub struct GenerateArgs {
    /// A checkpoint, or a run's folder: then its best checkpoint, else its newest
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// Configuration to use in place of the checkpoint's own
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The text to continue
    #[arg(long, default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    prompt: String,

    /// Most tokens to add [default: generation.max_new_tokens of the configuration, usually 100]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,

    /// Below 1 is safer, above 1 wilder, 0 takes the likeliest token [default: the configuration's, usually 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f64>,

    /// Draw among this many likeliest tokens; 0 is all [default: the configuration's, usually 50]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,

    /// Draw among the likeliest tokens that hold this probability; 1 is all [default: the configuration's, usually 0.9]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,

    /// Number of texts
    #[arg(long, value_name = "N", default_value_t = 1)]
    num_samples: usize,

    /// The same seed gives the same text
    #[arg(long, default_value_t = 42)]
    seed: u64,

    /// Read prompts and answer them, in a loop
    #[arg(long, conflicts_with_all = ["prompt", "output", "num_samples"])]
    interactive: bool,

    /// Write the texts into this file too
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

/// Runs `generate`.
///
/// # Errors
/// Of [`load_model_for_generation`] and [`generate_text`]; a reader that goes away early is none.
pub fn run(args: GenerateArgs) -> Result<()> {
    match generate(&args) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

fn generate(args: &GenerateArgs) -> Result<()> {
    let device = device_of(args.device)?;
    let checkpoint = resolve(&args.checkpoint)?;
    if checkpoint != args.checkpoint {
        note(&format!("checkpoint {}", checkpoint.display()));
    }
    let (model, tokenizer, config) = load_model_for_generation(&checkpoint, args.config.as_deref(), device)?;
    let params = params_of(args, &config);
    params.sampling.validate()?;
    if args.interactive {
        return interactive_generation(&model, &tokenizer, &params);
    }
    let texts = match args.num_samples {
        1 => vec![stream(&model, &tokenizer, &args.prompt, &params)?],
        _ => several(args, &model, &tokenizer, &params)?,
    };
    args.output.as_deref().map_or(Ok(()), |path| save(path, &texts))
}

fn params_of(args: &GenerateArgs, config: &Config) -> TextParams {
    let defaults = &config.generation;
    TextParams {
        max_new_tokens: args.max_new_tokens.unwrap_or(defaults.max_new_tokens),
        sampling: Sampling {
            temperature: args.temperature.unwrap_or(defaults.temperature),
            top_k: args.top_k.unwrap_or(defaults.top_k),
            top_p: args.top_p.unwrap_or(defaults.top_p),
        },
        seed: args.seed,
    }
}

/// Prints a text as it is drawn, and gives it.
fn stream(model: &TransformerLM, tokenizer: &Tokenizer, prompt: &str, params: &TextParams) -> Result<String> {
    let mut text = prompt.to_owned();
    let pieces = stream_text(model, tokenizer, prompt, params)?;
    say(prompt)?;
    for piece in pieces {
        let piece = piece?;
        say(&piece)?;
        text.push_str(&piece);
    }
    say("\n")?;
    Ok(text)
}

fn several(
    args: &GenerateArgs,
    model: &TransformerLM,
    tokenizer: &Tokenizer,
    params: &TextParams,
) -> Result<Vec<String>> {
    let texts = generate_text(model, tokenizer, &args.prompt, params, args.num_samples)?;
    say(&joined(&texts))?;
    Ok(texts)
}

fn save(path: &Path, texts: &[String]) -> Result<()> {
    write_atomically(path, joined(texts).as_bytes())
}

/// One text as it is, several with a line before each.
fn joined(texts: &[String]) -> String {
    match texts {
        [text] => format!("{text}\n"),
        texts => (1..).zip(texts).map(|(i, text)| format!("--- sample {i} of {} ---\n{text}\n", texts.len())).collect(),
    }
}

fn say(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", "standard output"))
}

/// For people, beside the text and never in it.
fn note(text: &str) {
    if stderr().is_terminal() {
        let _ = writeln!(stderr(), "{text}");
    }
}

fn device_of(choice: DeviceChoice) -> Result<Device> {
    let count = if tch::Cuda::is_available() { tch::Cuda::device_count().max(0) as usize } else { 0 };
    match choice {
        DeviceChoice::Auto if count == 0 => Ok(Device::Cpu),
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto | DeviceChoice::Cuda(None) if count > 0 => Ok(Device::Cuda(0)),
        DeviceChoice::Cuda(Some(index)) if index < count => Ok(Device::Cuda(index)),
        _ => Err(Error::Config(format!("--device {choice}, but {count} CUDA devices can be used; try --device cpu"))),
    }
}
