//! The two parts of a data folder.

use std::path::Path;
use std::sync::Arc;

use tch::Tensor;

use super::Tokenizer;
use super::shard::Shard;
use crate::{Error, Result};

/// The part to train on: the name of its file, or the beginning of the names of several.
pub const TRAIN: &str = "train";

/// The held-out part.
pub const VAL: &str = "val";

/// The file of shard `index` of `count` of a part: `train.bin`, or `train-00001-of-00003.bin`.
pub(super) fn shard_name(part: &str, index: usize, count: usize) -> String {
    if count == 1 { format!("{part}.bin") } else { format!("{part}-{index:05}-of-{count:05}.bin") }
}

/// A sequence of tokens on disk, in one or several shards. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TokenDataset {
    shards: Arc<Vec<Shard>>,
}

impl TokenDataset {
    /// Opens the shards of a part ([`TRAIN`], [`VAL`]) of a data folder.
    ///
    /// # Errors
    /// A shard that is missing, or as [`Shard::open`]; shards of different tokenizers, or in another order than they were made in.
    pub fn open(folder: &Path, part: &str) -> Result<Self> {
        let count = shard_count(folder, part)?;
        let open = |index| Shard::open(&folder.join(shard_name(part, index, count)));
        let shards: Vec<Shard> = (0..count).map(open).collect::<Result<_>>()?;
        let kind = |shard: &Shard| (shard.header().tokenizer.clone(), shard.header().vocab_size);
        if let Some(other) = shards.iter().find(|shard| kind(shard) != kind(&shards[0])) {
            return Err(Error::data(other.path(), "made with another tokenizer than the part's first shard"));
        }
        check_order(&shards)?;
        Ok(Self { shards: shards.into() })
    }

    /// The shards, in order; at least one.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Where it lies: its first shard.
    pub fn path(&self) -> &Path {
        self.shards[0].path()
    }

    /// Every token is below.
    pub fn vocab_size(&self) -> usize {
        self.shards[0].header().vocab_size
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.shards.iter().map(|shard| shard.header().tokens).sum()
    }

    /// Appends `len` tokens from `start` on to `tokens`, across the bounds of shards.
    ///
    /// # Errors
    /// Tokens that lie outside the part or outside the vocabulary.
    pub fn read(&self, start: u64, len: usize, tokens: &mut Vec<i64>) -> Result<()> {
        let (mut start, mut left) = (start, len as u64);
        for shard in self.shards.iter() {
            let held = shard.header().tokens;
            if start < held && left > 0 {
                let part = left.min(held - start);
                shard.read(start, part as usize, tokens)?;
                (start, left) = (start + part, left - part);
            }
            start = start.saturating_sub(held);
        }
        match left {
            0 => Ok(()),
            _ => Err(Error::data(self.path(), format!("{len} tokens asked, {left} more than there are"))),
        }
    }

    /// Number of tokens that have one before them.
    pub fn predictions(&self) -> u64 {
        self.tokens().saturating_sub(1)
    }

    /// Number of whole blocks of `seq_len + 1` tokens.
    pub fn blocks(&self, seq_len: usize) -> u64 {
        self.predictions() / (seq_len as u64).max(1)
    }

    /// Block `index`: `seq_len + 1` tokens from `index · seq_len` on; the one after the last whole block is shorter.
    ///
    /// # Errors
    /// No such block; a token outside the vocabulary.
    pub fn block(&self, seq_len: usize, index: u64) -> Result<Vec<i64>> {
        let mut tokens = Vec::with_capacity(seq_len + 1);
        self.read_block(seq_len, index, &mut tokens)?;
        Ok(tokens)
    }

    /// Whole blocks as a tensor (B, seq_len + 1), int64, in this order.
    ///
    /// # Errors
    /// No block asked for, or one that is not whole; a token outside the vocabulary.
    pub fn batch(&self, seq_len: usize, blocks: &[u64]) -> Result<Tensor> {
        let mut tokens = Vec::with_capacity(blocks.len() * (seq_len + 1));
        for &index in blocks {
            self.read_block(seq_len, index, &mut tokens)?;
        }
        let shape = [blocks.len() as i64, seq_len as i64 + 1];
        if tokens.is_empty() || tokens.len() as i64 != shape[0] * shape[1] {
            return Err(Error::data(self.path(), format!("blocks {blocks:?} of {seq_len} tokens are not whole")));
        }
        Ok(Tensor::from_slice(&tokens).view(shape))
    }

    fn read_block(&self, seq_len: usize, index: u64, tokens: &mut Vec<i64>) -> Result<()> {
        let start = index.saturating_mul(seq_len as u64);
        let left = self.predictions().saturating_sub(start);
        if left == 0 {
            let blocks = self.blocks(seq_len);
            return Err(Error::data(self.path(), format!("block {index} asked of {blocks} of {seq_len} tokens")));
        }
        self.read(start, left.min(seq_len as u64) as usize + 1, tokens)
    }
}

/// What `lm prepare` made.
#[derive(Clone, Debug)]
pub struct PreparedData {
    /// The part to train on.
    pub train: TokenDataset,
    /// The held-out part.
    pub val: TokenDataset,
    /// How the text became tokens.
    pub tokenizer: Tokenizer,
    /// Every token is below.
    pub vocab_size: usize,
}

/// Opens a data folder and checks that its parts are whole and belong together.
///
/// # Errors
/// A file that is missing, truncated or damaged, parts that do not fit each other.
pub fn load_preprocessed_data(data_dir: impl AsRef<Path>) -> Result<PreparedData> {
    let folder = data_dir.as_ref();
    if !folder.is_dir() {
        return Err(Error::data(folder, format!("no such folder; make it with `{}`", preparation(folder, None))));
    }
    let tokenizer = Tokenizer::load(folder)?;
    let (train, val) = (TokenDataset::open(folder, TRAIN)?, TokenDataset::open(folder, VAL)?);
    let vocab_size = tokenizer.vocab_size();
    for part in [&train, &val] {
        let header = part.shards()[0].header();
        if header.tokenizer != tokenizer.name() || header.vocab_size != vocab_size {
            let (theirs, size, ours) = (&header.tokenizer, header.vocab_size, tokenizer.name());
            let text =
                format!("made with tokenizer {theirs} of {size} tokens, but the folder's is {ours} of {vocab_size}");
            return Err(Error::data(part.path(), text));
        }
    }
    Ok(PreparedData { train, val, tokenizer, vocab_size })
}

/// The command that makes a data folder.
pub(crate) fn preparation(folder: &Path, tokenizer: Option<&str>) -> String {
    let tokenizer = tokenizer.unwrap_or("byte|char|gpt2|bpe");
    format!("lm prepare --input FILE… --tokenizer {tokenizer} --output {}", folder.display())
}

/// Refuses shards of which one was made to follow another than the one before it; older ones do not tell.
fn check_order(shards: &[Shard]) -> Result<()> {
    let checksums = shards.iter().map(|shard| shard.header().checksum);
    for (shard, before) in shards.iter().zip(std::iter::once(0).chain(checksums)) {
        if ![0, before].contains(&shard.header().before) {
            let text = "was not made to stand here: shards were exchanged or renamed; run `lm prepare` again";
            return Err(Error::data(shard.path(), text));
        }
    }
    Ok(())
}

/// Of how many shards a part is made, by the name of any of them; one where there is none.
fn shard_count(folder: &Path, part: &str) -> Result<usize> {
    if folder.join(shard_name(part, 0, 1)).exists() {
        return Ok(1);
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let count = |name: String| -> Option<usize> {
        let (_, count) = name.strip_prefix(part)?.strip_suffix(".bin")?.split_once("-of-")?;
        count.parse().ok().filter(|count| *count > 0)
    };
    Ok(names.filter_map(count).max().unwrap_or(1))
}
