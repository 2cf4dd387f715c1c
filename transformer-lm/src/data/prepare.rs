//! `lm prepare`: text files in, token shards out.

use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};

use super::bpe::BytePairs;
use super::dataset::shard_name;
use super::encode::{Reader, characters, encode, sample};
use super::input::find_files;
use super::output::{Output, UNSPLIT_FILE};
use super::shard::{Shard, ShardWriter};
use super::{Alphabet, TRAIN, Tokenizer, VAL};
use crate::{Error, Result};

/// Tokens copied at once.
const COPIED_TOKENS: usize = 1 << 20;

/// A byte-pair encoding is trained on about so much text, taken evenly from all of it.
const TRAINING_SAMPLE_BYTES: u64 = 512 << 20;

/// Which tokenizer to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TokenizerKind {
    /// A token for each byte.
    Byte,
    /// A token for each character that occurs.
    Char,
    /// GPT-2's byte-pair encoding.
    Gpt2,
    /// A byte-pair encoding of --vocab-size tokens, trained on the text.
    Bpe,
}

/// What to prepare.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Files (`.jsonl`: a document on each line; others: one document), folders, patterns; read in the order of their names.
    pub input: Vec<PathBuf>,
    /// The field of a `.jsonl` file's objects that holds the text.
    pub field: String,
    /// How text becomes tokens.
    pub tokenizer: TokenizerKind,
    /// Tokens of a `bpe` tokenizer.
    pub vocab_size: usize,
    /// The folder to make.
    pub output: PathBuf,
    /// The share of tokens, the last ones, that is held out, in (0, 1).
    pub val_fraction: f64,
    /// Most tokens in a shard.
    pub shard_tokens: u64,
    /// Threads that encode; the result does not depend on it.
    pub threads: usize,
    /// Replace `output` if it is a prepared folder. Nothing else is ever replaced.
    pub overwrite: bool,
    /// Show a progress bar on stderr where that is a terminal.
    pub progress: bool,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self {
            input: Vec::new(),
            field: "text".into(),
            tokenizer: TokenizerKind::Byte,
            vocab_size: 8192,
            output: "data/prepared".into(),
            val_fraction: 0.1,
            shard_tokens: 1 << 29,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            overwrite: false,
            progress: false,
        }
    }
}

/// What was prepared.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareSummary {
    /// Number of files read.
    pub files: usize,
    /// Number of documents.
    pub documents: u64,
    /// Bytes of the files.
    pub bytes: u64,
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens held out.
    pub val_tokens: u64,
    /// Number of different tokens.
    pub vocab_size: usize,
    /// The tokenizer's name.
    pub tokenizer: &'static str,
    /// CRC-32 of the documents' text, one after the other: what [`super::verify`] finds again.
    pub checksum: u32,
}

/// Makes a data folder. It appears at once and whole, or not at all; the same input gives the same bytes. Text is read in
/// pieces, so it may be larger than memory.
///
/// Each document is followed by the tokenizer's end token. `byte` and `char` have none: there a line break is between two
/// documents, which is added where the first does not end with one.
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
    if options.shard_tokens == 0 {
        return Err(Error::Config("--shard-tokens 0: expected at least 1".into()));
    }
    let output = Output::claim(&options.output, options.overwrite)?;
    let input = Input::new(options)?;
    let tokenizer = input.tokenizer(options)?;
    let all = output.staging().join(UNSPLIT_FILE);
    let (documents, checksum) = input.encode(&tokenizer, options.threads, &all)?;
    let (train_tokens, val_tokens) = split(&all, output.staging(), &tokenizer, options)?;
    std::fs::remove_file(&all).map_err(Error::io("remove", &all))?;
    tokenizer.save(output.staging())?;
    output.publish()?;
    let (files, bytes, vocab_size) = (input.files.len(), input.bytes, tokenizer.vocab_size());
    input.bar.finish_and_clear();
    let tokenizer = tokenizer.name();
    Ok(PrepareSummary { files, documents, bytes, train_tokens, val_tokens, vocab_size, tokenizer, checksum })
}

/// The text files, in order.
struct Input {
    files: Vec<PathBuf>,
    bytes: u64,
    reader: Reader,
    bar: ProgressBar,
}

impl Input {
    fn new(options: &PrepareOptions) -> Result<Self> {
        let files = find_files(&options.input)?;
        let mut bytes = 0;
        for path in &files {
            bytes += std::fs::metadata(path).map_err(Error::io("read", path))?.len();
        }
        if bytes == 0 {
            return Err(Error::Config("the input is empty; give --input files that hold text".into()));
        }
        let kind = options.tokenizer;
        let reader = Reader {
            field: options.field.clone(),
            utf8: kind != TokenizerKind::Byte,
            line_breaks: matches!(kind, TokenizerKind::Byte | TokenizerKind::Char),
        };
        let bar = if options.progress { ProgressBar::new(bytes) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Ok(Self { files, bytes, reader, bar })
    }

    /// Starts the bar anew, for another pass over the text.
    fn pass(&self, message: &'static str) -> ProgressBar {
        self.bar.set_message(message);
        self.bar.reset();
        self.bar.clone()
    }

    fn tokenizer(&self, options: &PrepareOptions) -> Result<Tokenizer> {
        match options.tokenizer {
            TokenizerKind::Byte => Ok(Tokenizer::Byte),
            TokenizerKind::Gpt2 => Ok(Tokenizer::Gpt2),
            TokenizerKind::Char => {
                let bar = self.pass("alphabet");
                let characters = characters(self.files.clone(), self.reader.clone(), options.threads, bar)?;
                Ok(Tokenizer::Char(Alphabet::new(&characters)))
            }
            TokenizerKind::Bpe => self.train_pairs(options.vocab_size),
        }
    }

    fn train_pairs(&self, vocab_size: usize) -> Result<Tokenizer> {
        let stride = self.bytes.div_ceil(TRAINING_SAMPLE_BYTES) as usize;
        let mut failure = None;
        // The iterator ends at the first error, which is looked at afterwards.
        let texts = sample(self.files.clone(), self.reader.clone(), stride, self.pass("vocabulary"))
            .map_while(|texts| texts.map_err(|error| failure = Some(error)).ok())
            .flatten();
        let trained = BytePairs::train(texts, vocab_size);
        match failure {
            Some(error) => Err(error),
            None => Ok(Tokenizer::Bpe(trained.map_err(Error::Config)?.into())),
        }
    }

    /// Writes all tokens into one shard; the number of documents and the checksum of their text.
    fn encode(&self, tokenizer: &Tokenizer, threads: usize, shard: &Path) -> Result<(u64, u32)> {
        let mut writer = ShardWriter::create(shard, tokenizer, 0)?;
        let (mut documents, mut checksum, mut owes_break) = (0, crc32fast::Hasher::new(), false);
        let (files, reader) = (self.files.clone(), self.reader.clone());
        for encoded in encode(files, reader, tokenizer.clone(), threads, self.pass("tokens")) {
            let encoded = encoded?;
            if encoded.tokens.is_empty() {
                continue;
            }
            if owes_break {
                writer.write(&tokenizer.encode("\n")?)?;
                checksum.update(b"\n");
            }
            owes_break = encoded.owes_break;
            writer.write(&encoded.tokens)?;
            documents += encoded.documents;
            checksum.combine(&encoded.checksum);
        }
        writer.finish()?;
        Ok((documents, checksum.finalize()))
    }
}

/// Cuts the shard `all` into the training and the held-out part; their numbers of tokens.
fn split(all: &Path, folder: &Path, tokenizer: &Tokenizer, options: &PrepareOptions) -> Result<(u64, u64)> {
    let all = Shard::open(all)?;
    let tokens = all.header().tokens;
    let train = (tokens as f64 * (1.0 - options.val_fraction)) as u64;
    let val = tokens - train;
    if train < 2 || val < 2 {
        let text = format!("{train} tokens to train on and {val} held out; each part needs 2. Give more text");
        return Err(Error::Config(text));
    }
    for (part, range) in [(TRAIN, 0..train), (VAL, train..tokens)] {
        let count = (range.end - range.start).div_ceil(options.shard_tokens) as usize;
        let mut before = 0;
        for (index, start) in
            range.clone().step_by(usize::try_from(options.shard_tokens).unwrap_or(usize::MAX)).enumerate()
        {
            let shard = start..range.end.min(start.saturating_add(options.shard_tokens));
            let target = folder.join(shard_name(part, index, count));
            before = copy(&all, shard, ShardWriter::create(&target, tokenizer, before)?)?;
        }
    }
    Ok((train, val))
}

/// Copies some tokens; their checksum.
fn copy(source: &Shard, range: Range<u64>, mut writer: ShardWriter) -> Result<u32> {
    for start in range.clone().step_by(COPIED_TOKENS) {
        let mut tokens = Vec::with_capacity(COPIED_TOKENS);
        source.read(start, (range.end - start).min(COPIED_TOKENS as u64) as usize, &mut tokens)?;
        writer.write(&tokens.into_iter().map(|token| token as u32).collect::<Vec<_>>())?;
    }
    writer.finish()
}
