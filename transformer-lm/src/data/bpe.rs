//! A byte-pair encoding that is trained on the text at hand.

use std::str::FromStr;

use serde_json::Value;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Model};

/// The name of the token that ends a document, GPT-2's.
const END: &str = "<|endoftext|>";

/// The 256 bytes and the end token.
pub(super) const FEWEST_TOKENS: usize = 257;

/// The trainer takes memory for all at once; no known vocabulary has a tenth of these.
const MOST_TOKENS: usize = 1 << 24;

/// A byte-level byte-pair encoding (Sennrich et al., 2016; on bytes as in GPT-2), with GPT-2's rule for what is a word. It is
/// kept in the format of the `tokenizers` library, which other programs read.
#[derive(Debug)]
pub struct BytePairs {
    encoding: tokenizers::Tokenizer,
    /// The bytes of each token; of the end token those of its name.
    bytes: Vec<Vec<u8>>,
    end: u32,
}

impl PartialEq for BytePairs {
    fn eq(&self, other: &Self) -> bool {
        self.description() == other.description()
    }
}

impl BytePairs {
    /// Learns the merges of at most `vocab_size` tokens; a text may not have enough different pairs for all. The same texts
    /// in the same order give the same tokens.
    ///
    /// # Errors
    /// A reason, for a vocabulary that is too small.
    pub(super) fn train(texts: impl Iterator<Item = String> + Send, vocab_size: usize) -> Result<Self, String> {
        if !(FEWEST_TOKENS..=MOST_TOKENS).contains(&vocab_size) {
            return Err(format!(
                "--vocab-size {vocab_size}: expected at least {FEWEST_TOKENS}, the bytes and the end token, and at most \
                 {MOST_TOKENS}"
            ));
        }
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END, true)]);
        let mut encoding = tokenizers::Tokenizer::new(BPE::default());
        encoding.with_pre_tokenizer(Some(ByteLevel::new(false, false, true)));
        encoding.with_decoder(Some(ByteLevel::default()));
        let mut trainer = TrainerWrapper::from(trainer.build());
        encoding.train(&mut trainer, texts).map_err(|error| error.to_string())?;
        Self::new(encoding)
    }

    /// Reads what [`BytePairs::description`] gave.
    pub(crate) fn from_description(description: &Value) -> Result<Self, String> {
        let encoding = tokenizers::Tokenizer::from_str(&description.to_string()).map_err(|error| error.to_string())?;
        Self::new(encoding)
    }

    fn new(mut encoding: tokenizers::Tokenizer) -> Result<Self, String> {
        // Markup within a text is text.
        encoding.set_encode_special_tokens(true);
        let end = encoding.token_to_id(END).ok_or_else(|| format!("it lacks the token {END}"))?;
        let count = u32::try_from(encoding.get_vocab_size(true)).map_err(|_| "it has too many tokens")?;
        let bytes = |id| match encoding.id_to_token(id) {
            Some(name) if id == end => Ok(name.into_bytes()),
            Some(token) => bytes_of(&token).ok_or_else(|| format!("its token {id}, {token:?}, stands for no bytes")),
            None => Err(format!("it lacks token {id} of {count}")),
        };
        let bytes: Vec<Vec<u8>> = (0..count).map(bytes).collect::<Result<_, _>>()?;
        if let Some(byte) =
            (0..=255u8).find(|byte| encoding.get_model().token_to_id(&symbol(*byte).to_string()).is_none())
        {
            return Err(format!("it lacks a token for byte {byte}"));
        }
        Ok(Self { encoding, bytes, end })
    }

    /// In the format of the `tokenizers` library, as other programs' `tokenizer.json`.
    pub fn description(&self) -> Value {
        // The library writes the same tables in the same order each time.
        self.encoding.to_string(false).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn end(&self) -> u32 {
        self.end
    }

    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let encoding = self.encoding.encode_fast(text, false).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The bytes of a token, of none outside the vocabulary.
    pub(super) fn bytes(&self, token: u32) -> Option<&[u8]> {
        self.bytes.get(token as usize).map(Vec::as_slice)
    }
}

/// The character that stands for a byte in the vocabulary: itself if it can be printed, else one from U+0100 on.
pub(crate) fn symbol(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let rank = (0..byte).filter(|other| !printable(*other)).count() as u32;
            char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    }
}

/// The bytes that a token's characters stand for.
fn bytes_of(token: &str) -> Option<Vec<u8>> {
    let byte = |c: char| (0..=255u8).find(|byte| symbol(*byte) == c);
    token.chars().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_those_of_the_library() {
        let ours: std::collections::HashSet<char> = (0..=255u8).map(symbol).collect();
        assert_eq!(ours, ByteLevel::alphabet().into_iter().collect());
        assert_eq!((symbol(b' '), symbol(b'\n'), symbol(b'a')), ('Ġ', 'Ċ', 'a'));
    }

    #[test]
    fn frequent_words_become_tokens() {
        let texts = || (0..50).map(|_| "the king and the queen, the crown".to_string());
        let pairs = BytePairs::train(texts(), 300).unwrap();
        assert_eq!(pairs.encode(" the").unwrap().len(), 1);
        assert_eq!(pairs, BytePairs::train(texts(), 300).unwrap());
        assert_eq!(pairs.bytes(pairs.end()), Some(END.as_bytes()));
        assert!(BytePairs::train(texts(), 256).unwrap_err().contains("--vocab-size 256"));
    }
}
