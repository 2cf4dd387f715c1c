//! `generate` and `lm generate`.

use std::io::{IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};

use clap::builder::{NonEmptyStringValueParser, RangedU64ValueParser};
use clap::{Parser, ValueEnum};
use rustix::fs::{Access, access};
use rustix::io::Errno;
use tch::Device;

use crate::checkpoint::{resolve, write_atomically};
use crate::config::DeviceChoice;
use crate::data::Tokenizer;
use crate::generate::{
    Sample, TextParams, generate_samples, generate_text, interactive_generation, load_model_for_generation,
    stream_text, with_kept_settings,
};
use crate::model::{StepWeights, TransformerLM};
use crate::stdout::say;
use crate::{Config, Error, Result};

const EXAMPLES: &str = "\
Examples:
  generate --checkpoint runs/20260101_120000_demo --prompt 'ROMEO:'
  generate --checkpoint runs/20260101_120000_demo/best_model --interactive
  generate --checkpoint model --prompt 'Once' --num-samples 3 --seed 7 --output texts.txt
  echo 'Once upon' | generate --checkpoint model --prompt-file - --stop '.' --greedy --json

Exit codes: 0 success; 1 failure; 2 a mistake in flags or settings.";

/// What weights are read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// As they are.
    F32,
    /// Rounded to 8 bits of precision.
    Bf16,
    /// Rounded to whole numbers from -127 to 127, each 32 of which share a scale.
    Int8,
}

impl Weights {
    fn rounded(self) -> Option<StepWeights> {
        match self {
            Weights::F32 => None,
            Weights::Bf16 => Some(StepWeights::Bf16),
            Weights::Int8 => Some(StepWeights::Int8),
        }
    }
}

/// Let a trained model continue a text
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

    /// Continue the text of this file; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "interactive"])]
    prompt_file: Option<PathBuf>,

    /// Most tokens to add [default: generation.max_new_tokens of the configuration, usually 100]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_new_tokens: Option<usize>,

    /// Below 1 is safer, above 1 wilder, 0 takes the likeliest token [default: the configuration's, usually 0.8]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f64>,

    /// Draw among this many likeliest tokens; 0 is all [default: the configuration's, usually 50]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    top_k: Option<usize>,

    /// Draw among the likeliest tokens that hold this probability; 1 is all [default: the configuration's, usually 0.9]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,

    /// Leave out tokens with less than this share of the likeliest one's probability [default: the configuration's, usually 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f64>,

    /// Above 1 makes tokens that are in the text already less likely [default: the configuration's, usually 1]
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,

    /// Always take the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    greedy: bool,

    /// End a text before this one; may be repeated [default: the configuration's, usually none]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,

    /// Number of texts, drawn side by side
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true,
          value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    num_samples: usize,

    /// Write an object on a line for each text: sample, prompt, text, tokens, ending (length, end or stop), seed
    #[arg(long)]
    json: bool,

    /// The same seed gives the same text
    #[arg(long, default_value_t = 42, allow_negative_numbers = true)]
    seed: u64,

    /// Read prompts and answer them, in a loop
    #[arg(long, conflicts_with_all = ["prompt", "output", "num_samples", "json"])]
    interactive: bool,

    /// Write the texts into this file too
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// What the weights are read as for each new token; on a CPU large models take half the time with bf16, less with int8, and
    /// their logits differ a little
    #[arg(long, value_enum, default_value = "f32")]
    weights: Weights,

    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

/// Runs `generate`.
///
/// # Errors
/// Of [`load_model_for_generation`] and [`generate_text`].
pub fn run(args: GenerateArgs) -> Result<()> {
    let args = &args;
    let device = device_of(args.device)?;
    let checkpoint = resolve(&args.checkpoint)?;
    if checkpoint != args.checkpoint {
        note(&format!("checkpoint {}", checkpoint.display()));
    }
    let (mut model, tokenizer, config) = load_model_for_generation(&checkpoint, args.config.as_deref(), device)?;
    args.weights.rounded().map_or(Ok(()), |weights| model.narrow_weights(weights))?;
    model.use_large_pages();
    let params = params_of(args, &config)?;
    params.sampling.validate()?;
    if args.interactive {
        return interactive_generation(&model, &tokenizer, &params);
    }
    let prompt = prompt_of(args)?;
    args.output.as_deref().map_or(Ok(()), check_output)?;
    let written = match (args.json, args.num_samples) {
        (true, count) => show(as_json(args, &prompt, &generate_samples(&model, &tokenizer, &prompt, &params, count)?)),
        (false, 1) => stream(&model, &tokenizer, &prompt, &params),
        (false, count) => show(joined(&generate_text(&model, &tokenizer, &prompt, &params, count)?)),
    }?;
    args.output.as_deref().map_or(Ok(()), |path| write_atomically(path, written.as_bytes()))
}

/// Whether a file can be made at `path`, so that no text is drawn in vain.
fn check_output(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("")).join(".");
    let checked = if path.is_dir() { Err(Errno::ISDIR) } else { access(folder, Access::WRITE_OK) };
    checked.map_err(|error| Error::io("write", path)(error.into()))
}

/// The text to continue. A file's last line break is not part of it: editors and `echo` put it there.
fn prompt_of(args: &GenerateArgs) -> Result<String> {
    let Some(path) = &args.prompt_file else { return Ok(args.prompt.clone()) };
    let text = match path.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()).map_err(Error::io("read", "standard input"))?,
        false => std::fs::read_to_string(path).map_err(Error::io("read", path))?,
    };
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// The configuration's settings, then those kept from earlier conversations, then the flags.
fn params_of(args: &GenerateArgs, config: &Config) -> Result<TextParams> {
    let mut params = TextParams::of(&config.generation, config.generation.max_new_tokens, args.seed);
    if args.interactive {
        params = with_kept_settings(&params)?;
    }
    let sampling = &mut params.sampling;
    let set = |value: &mut f64, flag: Option<f64>| *value = flag.unwrap_or(*value);
    set(&mut sampling.temperature, args.temperature);
    set(&mut sampling.top_p, args.top_p);
    set(&mut sampling.min_p, args.min_p);
    set(&mut sampling.repetition_penalty, args.repetition_penalty);
    sampling.top_k = args.top_k.unwrap_or(sampling.top_k);
    if args.greedy {
        sampling.temperature = 0.0;
    }
    params.max_new_tokens = args.max_new_tokens.unwrap_or(params.max_new_tokens);
    if !args.stop.is_empty() {
        params.stop = args.stop.clone();
    }
    Ok(params)
}

/// Prints a text as it is drawn, and gives all that was printed.
fn stream(model: &TransformerLM, tokenizer: &Tokenizer, prompt: &str, params: &TextParams) -> Result<String> {
    let pieces = stream_text(model, tokenizer, prompt, params)?;
    let mut written = show(prompt.to_owned())?;
    for piece in pieces {
        written.push_str(&show(piece?)?);
    }
    written.push_str(&show("\n".to_owned())?);
    Ok(written)
}

/// Prints a text and gives it back.
fn show(text: String) -> Result<String> {
    say(&text).map(|()| text)
}

fn as_json(args: &GenerateArgs, prompt: &str, samples: &[Sample]) -> String {
    let line = |(number, sample): (usize, &Sample)| {
        let Sample { text, tokens, ending } = sample;
        let object = serde_json::json!({
            "sample": number, "prompt": prompt, "text": text, "tokens": tokens, "ending": ending, "seed": args.seed
        });
        format!("{object}\n")
    };
    (1..).zip(samples).map(line).collect()
}

/// One text as it is, several with a line before each.
fn joined(texts: &[String]) -> String {
    match texts {
        [text] => format!("{text}\n"),
        texts => (1..).zip(texts).map(|(i, text)| format!("--- sample {i} of {} ---\n{text}\n", texts.len())).collect(),
    }
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
