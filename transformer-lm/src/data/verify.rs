//! Reads a data folder back.

use std::path::Path;

use super::{PreparedData, TokenDataset, Tokenizer, load_preprocessed_data};
use crate::Result;

/// Tokens read at once.
const READ_TOKENS: usize = 1 << 20;

/// What [`verify`] found in a folder whose every checksum is right.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified {
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens held out.
    pub val_tokens: u64,
    /// Shards of both parts.
    pub shards: usize,
    /// Bytes of text that the tokens stand for.
    pub bytes: u64,
    /// CRC-32 of these bytes.
    pub checksum: u32,
}

/// Reads every token of a data folder: checksums of the shards, tokens within the vocabulary, and the text that they stand for.
///
/// # Errors
/// As [`load_preprocessed_data`]; a shard that is damaged.
pub fn verify(folder: &Path) -> Result<Verified> {
    let PreparedData { train, val, tokenizer, .. } = load_preprocessed_data(folder)?;
    let mut text = Text::new(&tokenizer);
    for part in [&train, &val] {
        part.shards().iter().try_for_each(|shard| shard.verify())?;
        text.read(part)?;
    }
    Ok(Verified {
        train_tokens: train.tokens(),
        val_tokens: val.tokens(),
        shards: train.shards().len() + val.shards().len(),
        bytes: text.bytes,
        checksum: text.checksum.finalize(),
    })
}

/// The text so far, as length and checksum.
struct Text {
    /// The bytes of each token; of the end token none.
    of_token: Vec<Vec<u8>>,
    bytes: u64,
    checksum: crc32fast::Hasher,
}

impl Text {
    fn new(tokenizer: &Tokenizer) -> Self {
        let bytes = |token| match Some(token) == tokenizer.end_token() {
            true => Vec::new(),
            false => tokenizer.bytes_of(token).into_owned(),
        };
        let of_token = (0..tokenizer.vocab_size() as u32).map(bytes).collect();
        Self { of_token, bytes: 0, checksum: crc32fast::Hasher::new() }
    }

    fn read(&mut self, part: &TokenDataset) -> Result<()> {
        let total = part.tokens();
        for start in (0..total).step_by(READ_TOKENS) {
            let mut tokens = Vec::with_capacity(READ_TOKENS);
            part.read(start, (total - start).min(READ_TOKENS as u64) as usize, &mut tokens)?;
            let text: Vec<u8> = tokens.iter().flat_map(|&token| &self.of_token[token as usize]).copied().collect();
            self.bytes += text.len() as u64;
            self.checksum.update(&text);
        }
        Ok(())
    }
}
