//! `lm prepare`: text files in, token shards out.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};

use super::output::{Output, UNSPLIT_FILE};
use super::shard::{Shard, ShardWriter};
use super::{Alphabet, TRAIN_FILE, Tokenizer, VAL_FILE};
use crate::{Error, Result};

/// Tokens copied at once.
const COPIED_TOKENS: usize = 1 << 20;

/// Which tokenizer to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TokenizerKind {
    /// A token for each byte.
    Byte,
    /// A token for each character that occurs.
    Char,
    /// GPT-2's byte-pair encoding.
    Gpt2,
}

/// What to prepare.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Text files; they are read in the order of their names.
    pub input: Vec<PathBuf>,
    /// How text becomes tokens.
    pub tokenizer: TokenizerKind,
    /// The folder to make.
    pub output: PathBuf,
    /// The share of tokens, the last ones, that is held out, in (0, 1).
    pub val_fraction: f64,
    /// Replace `output` if it is a prepared folder. Nothing else is ever replaced.
    pub overwrite: bool,
    /// Show a progress bar on stderr where that is a terminal.
    pub progress: bool,
}

/// What was prepared.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareSummary {
    /// Number of files read.
    pub files: usize,
    /// Bytes of text.
    pub bytes: u64,
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens held out.
    pub val_tokens: u64,
    /// Number of different tokens.
    pub vocab_size: usize,
    /// The tokenizer's name.
    pub tokenizer: &'static str,
}

/// Makes a data folder. It appears at once and whole, or not at all; the same input gives the same bytes.
///
/// # Errors
/// Files that are missing, empty or (but for `byte`) no UTF-8; a folder in the way; too little text.
pub fn prepare(options: &PrepareOptions) -> Result<PrepareSummary> {
    if !(options.val_fraction > 0.0 && options.val_fraction < 1.0) {
        return Err(Error::Config(format!(
            "--val-fraction {}: expected more than 0, less than 1",
            options.val_fraction
        )));
    }
    let output = Output::claim(&options.output, options.overwrite)?;
    let input = Input::new(options)?;
    let tokenizer = input.tokenizer(options.tokenizer)?;
    let all = output.staging().join(UNSPLIT_FILE);
    input.encode(&tokenizer, &all)?;
    let (train_tokens, val_tokens) = split(&all, output.staging(), &tokenizer, options.val_fraction)?;
    std::fs::remove_file(&all).map_err(Error::io("remove", &all))?;
    tokenizer.save(output.staging())?;
    output.publish()?;
    let (files, bytes, vocab_size) = (input.files.len(), input.bytes, tokenizer.vocab_size());
    input.bar.finish_and_clear();
    Ok(PrepareSummary { files, bytes, train_tokens, val_tokens, vocab_size, tokenizer: tokenizer.name() })
}

/// The text files, in order.
struct Input {
    files: Vec<PathBuf>,
    bytes: u64,
    bar: ProgressBar,
}

impl Input {
    fn new(options: &PrepareOptions) -> Result<Self> {
        let mut files = options.input.clone();
        files.sort_by(|a, b| (a.file_name(), a).cmp(&(b.file_name(), b)));
        files.dedup();
        let mut bytes = 0;
        for path in &files {
            let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
            if !metadata.is_file() {
                return Err(Error::data(path, "not a file; give text files"));
            }
            bytes += metadata.len();
        }
        if bytes == 0 {
            return Err(Error::Config("the input is empty; give --input files that hold text".into()));
        }
        let passes = if options.tokenizer == TokenizerKind::Char { 2 } else { 1 };
        let bar = if options.progress { ProgressBar::new(bytes * passes) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Self { files, bytes, bar })
    }

    fn tokenizer(&self, kind: TokenizerKind) -> Result<Tokenizer> {
        match kind {
            TokenizerKind::Byte => Ok(Tokenizer::Byte),
            TokenizerKind::Gpt2 => Ok(Tokenizer::Gpt2),
            TokenizerKind::Char => {
                self.bar.set_message("alphabet");
                let mut characters = BTreeSet::new();
                for path in &self.files {
                    characters.extend(self.text(path)?.chars());
                }
                Ok(Tokenizer::Char(Alphabet::new(&characters)))
            }
        }
    }

    /// Writes all tokens into one shard.
    fn encode(&self, tokenizer: &Tokenizer, shard: &Path) -> Result<()> {
        self.bar.set_message("tokens");
        let mut writer = ShardWriter::create(shard, tokenizer)?;
        for path in &self.files {
            match tokenizer {
                Tokenizer::Byte => writer.write(&self.bytes(path)?.into_iter().map(u32::from).collect::<Vec<_>>())?,
                _ => writer.write(&tokenizer.encode(&self.text(path)?)?)?,
            }
        }
        writer.finish()?;
        Ok(())
    }

    fn text(&self, path: &Path) -> Result<String> {
        String::from_utf8(self.bytes(path)?).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            Error::data(
                path,
                format!("no UTF-8 at byte {at}; convert it, or use --tokenizer byte, which takes any bytes"),
            )
        })
    }

    fn bytes(&self, path: &Path) -> Result<Vec<u8>> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        self.bar.inc(bytes.len() as u64);
        Ok(bytes)
    }
}

/// Cuts the shard `all` into the training and the held-out part; their numbers of tokens.
fn split(all: &Path, folder: &Path, tokenizer: &Tokenizer, val_fraction: f64) -> Result<(u64, u64)> {
    let all = Shard::open(all)?;
    let tokens = all.header().tokens;
    let train = (tokens as f64 * (1.0 - val_fraction)) as u64;
    let val = tokens - train;
    if train < 2 || val < 2 {
        let text = format!("{train} tokens to train on and {val} held out; each part needs 2. Give more text");
        return Err(Error::Config(text));
    }
    copy(&all, 0..train, &folder.join(TRAIN_FILE), tokenizer)?;
    copy(&all, train..tokens, &folder.join(VAL_FILE), tokenizer)?;
    Ok((train, val))
}

fn copy(source: &Shard, range: Range<u64>, target: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let mut writer = ShardWriter::create(target, tokenizer)?;
    for start in range.clone().step_by(COPIED_TOKENS) {
        let mut tokens = Vec::with_capacity(COPIED_TOKENS);
        source.read(start, (range.end - start).min(COPIED_TOKENS as u64) as usize, &mut tokens)?;
        writer.write(&tokens.into_iter().map(|token| token as u32).collect::<Vec<_>>())?;
    }
    writer.finish()?;
    Ok(())
}
