//! The two parts of a data folder.

use std::path::Path;
use std::sync::Arc;

use tch::Tensor;

use super::Tokenizer;
use super::shard::Shard;
use crate::{Error, Result};

/// The part to train on.
pub const TRAIN_FILE: &str = "train.bin";

/// The held-out part.
pub const VAL_FILE: &str = "val.bin";

/// A sequence of tokens on disk. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TokenDataset {
    shard: Arc<Shard>,
}

impl TokenDataset {
    /// Opens a shard.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { shard: Arc::new(Shard::open(path)?) })
    }

    /// The shard it lies in.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.shard.header().tokens
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
            return Err(Error::data(self.shard.path(), format!("blocks {blocks:?} of {seq_len} tokens are not whole")));
        }
        Ok(Tensor::from_slice(&tokens).view(shape))
    }

    fn read_block(&self, seq_len: usize, index: u64, tokens: &mut Vec<i64>) -> Result<()> {
        let start = index.saturating_mul(seq_len as u64);
        let left = self.predictions().saturating_sub(start);
        if left == 0 {
            let blocks = self.blocks(seq_len);
            return Err(Error::data(self.shard.path(), format!("block {index} asked of {blocks} of {seq_len} tokens")));
        }
        self.shard.read(start, left.min(seq_len as u64) as usize + 1, tokens)
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
        let text = "no such folder; make it with `lm prepare --input FILE… --tokenizer byte --output FOLDER`";
        return Err(Error::data(folder, text));
    }
    let tokenizer = Tokenizer::load(folder)?;
    let train = TokenDataset::open(&folder.join(TRAIN_FILE))?;
    let val = TokenDataset::open(&folder.join(VAL_FILE))?;
    let vocab_size = tokenizer.vocab_size();
    for part in [&train, &val] {
        let header = part.shard().header();
        if header.tokenizer != tokenizer.name() || header.vocab_size != vocab_size {
            let (theirs, size, ours) = (&header.tokenizer, header.vocab_size, tokenizer.name());
            let text =
                format!("made with tokenizer {theirs} of {size} tokens, but the folder's is {ours} of {vocab_size}");
            return Err(Error::data(part.shard().path(), text));
        }
    }
    Ok(PreparedData { train, val, tokenizer, vocab_size })
}
