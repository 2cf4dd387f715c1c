//! Text to tokens and back.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use tiktoken_rs::CoreBPE;

use super::bpe::BytePairs;
use crate::checkpoint::write_atomically;
use crate::{Error, Result};

/// The file that holds a data folder's or a checkpoint's tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// GPT-2's vocabulary with its end token.
pub(crate) const GPT2_VOCABULARY: usize = 50257;

/// GPT-2's `<|endoftext|>`.
const GPT2_END: u32 = 50256;

/// The largest token number plus one that Unicode's characters could need.
const MOST_CHARACTERS: usize = 0x11_0000;

/// How text becomes tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Tokenizer {
    /// A token for each byte; 256 tokens. Takes any file.
    Byte,
    /// A token for each character of an alphabet.
    Char(Alphabet),
    /// GPT-2's byte-pair encoding; 50257 tokens.
    Gpt2,
    /// A byte-pair encoding that was trained on the text.
    Bpe(Arc<BytePairs>),
}

/// The characters that a text is made of, in the order of their code points. A character's place is its token.
#[derive(Clone, Debug, PartialEq)]
pub struct Alphabet {
    characters: Vec<char>,
    tokens: HashMap<char, u32>,
}

impl Alphabet {
    /// An alphabet of these characters.
    pub fn new(characters: &BTreeSet<char>) -> Self {
        let characters: Vec<char> = characters.iter().copied().collect();
        let tokens = characters.iter().copied().zip(0..).collect();
        Self { characters, tokens }
    }

    /// The characters in order of their tokens.
    pub fn characters(&self) -> &[char] {
        &self.characters
    }
}

/// What `tokenizer.json` holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alphabet: Option<String>,
    /// The `tokenizers` library's description of a `bpe` tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokenizer: Option<serde_json::Value>,
}

impl Tokenizer {
    /// `byte`, `char`, `gpt2` or `bpe`, as in shard headers and on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Tokenizer::Byte => "byte",
            Tokenizer::Char(_) => "char",
            Tokenizer::Gpt2 => "gpt2",
            Tokenizer::Bpe(_) => "bpe",
        }
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Byte => 256,
            Tokenizer::Char(alphabet) => alphabet.characters.len(),
            Tokenizer::Gpt2 => GPT2_VOCABULARY,
            Tokenizer::Bpe(pairs) => pairs.vocab_size(),
        }
    }

    /// The token that ends a document, where the tokenizer has one.
    pub fn end_token(&self) -> Option<u32> {
        match self {
            Tokenizer::Byte | Tokenizer::Char(_) => None,
            Tokenizer::Gpt2 => Some(GPT2_END),
            Tokenizer::Bpe(pairs) => Some(pairs.end()),
        }
    }

    /// Text to tokens. Markup like `<|endoftext|>` is ordinary text.
    ///
    /// # Errors
    /// A character that a `char` tokenizer's alphabet lacks; the error names it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Tokenizer::Byte => Ok(text.bytes().map(u32::from).collect()),
            Tokenizer::Char(alphabet) => text.chars().map(|c| alphabet.token(c)).collect(),
            Tokenizer::Gpt2 => Ok(gpt2().encode_ordinary(text)),
            Tokenizer::Bpe(pairs) => pairs.encode(text).map_err(Error::Config),
        }
    }

    /// Tokens to text. Bytes that are no UTF-8 and tokens outside the vocabulary become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| self.bytes_of(token).into_owned()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text's bytes that each token stands for, by token; 0 for the end token.
    pub fn byte_lengths(&self) -> Vec<u32> {
        let length = |token| if Some(token) == self.end_token() { 0 } else { self.bytes_of(token).len() as u32 };
        (0..self.vocab_size() as u32).map(length).collect()
    }

    /// The bytes of one token.
    pub(crate) fn bytes_of(&self, token: u32) -> Cow<'_, [u8]> {
        let unknown = Cow::Borrowed("\u{FFFD}".as_bytes());
        match self {
            Tokenizer::Byte => u8::try_from(token).map_or(unknown, |byte| vec![byte].into()),
            Tokenizer::Char(alphabet) => {
                let character = alphabet.characters.get(token as usize);
                character.map_or(unknown, |c| c.to_string().into_bytes().into())
            }
            Tokenizer::Gpt2 => gpt2().decode_bytes(&[token]).map_or(unknown, Cow::Owned),
            Tokenizer::Bpe(pairs) => pairs.bytes(token).map_or(unknown, Cow::Borrowed),
        }
    }

    /// Reads what [`Tokenizer::save`] wrote into `folder`.
    ///
    /// # Errors
    /// A missing or damaged file.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(TOKENIZER_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let description: Description =
            serde_json::from_str(&text).map_err(|error| Error::data(&path, format!("not a tokenizer: {error}")))?;
        Self::from_description(description).map_err(|detail| Error::data(&path, detail))
    }

    /// Writes `tokenizer.json` into `folder`, which exists.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let alphabet = match self {
            Tokenizer::Char(alphabet) => Some(alphabet.characters.iter().collect()),
            _ => None,
        };
        let tokenizer = match self {
            Tokenizer::Bpe(pairs) => Some(pairs.description()),
            _ => None,
        };
        let description = Description { kind: self.name().into(), alphabet, tokenizer };
        let path = folder.join(TOKENIZER_FILE);
        let text = serde_json::to_string_pretty(&description)
            .map_err(|error| Error::data(&path, format!("cannot be written: {error}")))?;
        write_atomically(&path, format!("{text}\n").as_bytes())
    }

    fn from_description(description: Description) -> std::result::Result<Self, String> {
        let Description { kind, alphabet, tokenizer } = description;
        match (kind.as_str(), alphabet, tokenizer) {
            ("byte", None, None) => Ok(Tokenizer::Byte),
            ("gpt2", None, None) => Ok(Tokenizer::Gpt2),
            ("char", Some(text), None) => Alphabet::read(&text).map(Tokenizer::Char),
            ("char", None, _) => Err("a `char` tokenizer needs its `alphabet`".into()),
            ("bpe", None, Some(tokenizer)) => Ok(Tokenizer::Bpe(BytePairs::from_description(&tokenizer)?.into())),
            ("bpe", _, None) => Err("a `bpe` tokenizer needs its `tokenizer`".into()),
            (kind @ ("byte" | "gpt2" | "bpe"), Some(_), _) => Err(format!("a `{kind}` tokenizer has no `alphabet`")),
            (kind @ ("byte" | "gpt2" | "char"), _, Some(_)) => Err(format!("a `{kind}` tokenizer has no `tokenizer`")),
            (kind, ..) => Err(format!("unknown tokenizer `{kind}`; expected byte, char, gpt2 or bpe")),
        }
    }
}

impl Alphabet {
    fn read(text: &str) -> std::result::Result<Self, String> {
        let characters: BTreeSet<char> = text.chars().collect();
        let count = text.chars().count();
        if count == 0 || count > MOST_CHARACTERS || !text.chars().eq(characters.iter().copied()) {
            return Err("`alphabet` must hold different characters in the order of their code points".into());
        }
        Ok(Alphabet::new(&characters))
    }

    fn token(&self, character: char) -> Result<u32> {
        self.tokens.get(&character).copied().ok_or_else(|| {
            let (code, known) = (character as u32, self.characters.len());
            Error::Config(format!("{character:?} (U+{code:04X}) is not among the {known} characters of this alphabet"))
        })
    }
}

/// GPT-2's encoding, read once (50 ms).
fn gpt2() -> &'static CoreBPE {
    static ENCODING: OnceLock<CoreBPE> = OnceLock::new();
    ENCODING.get_or_init(|| tiktoken_rs::r50k_base().expect("the vocabulary is part of the program"))
}

/// Decodes tokens as they come: text is given out once its last byte is there, so that a character whose bytes are
/// spread over tokens appears whole.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes that may still become a character; at most three.
    held: Vec<u8>,
}

impl<'a> StreamDecoder<'a> {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, held: Vec::new() }
    }

    /// The text that is complete with this token; may be empty.
    pub fn push(&mut self, token: u32) -> String {
        self.held.extend_from_slice(&self.tokenizer.bytes_of(token));
        let whole = whole_characters(&self.held);
        let rest = self.held.split_off(whole);
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held = rest;
        text
    }

    /// What is left at the end; U+FFFD for a character that was cut.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

/// How many of the bytes are decided: all but an incomplete character at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    let mut start = 0;
    loop {
        match std::str::from_utf8(&bytes[start..]) {
            Ok(_) => return bytes.len(),
            Err(error) => match error.error_len() {
                Some(len) => start += error.valid_up_to() + len,
                None => return start + error.valid_up_to(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alphabet_of(text: &str) -> Tokenizer {
        Tokenizer::Char(Alphabet::new(&text.chars().collect()))
    }

    /// A byte-pair encoding of a small vocabulary.
    fn pairs() -> Tokenizer {
        static PAIRS: OnceLock<Tokenizer> = OnceLock::new();
        let texts = ["abba <|endoftext|> is the name of a band", "naïve, cab, é"].map(String::from).into_iter();
        PAIRS.get_or_init(|| Tokenizer::Bpe(BytePairs::train(texts, 270).unwrap().into())).clone()
    }

    fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
        let mut decoder = StreamDecoder::new(tokenizer);
        let mut text: String = tokens.iter().map(|&token| decoder.push(token)).collect();
        text.push_str(&decoder.finish());
        text
    }

    proptest! {
        #[test]
        fn every_text_comes_back(text in "\\PC*|[a-f \n]*|.*") {
            for tokenizer in [Tokenizer::Byte, alphabet_of(&text), Tokenizer::Gpt2, pairs()] {
                let tokens = tokenizer.encode(&text).unwrap();
                prop_assert!(tokens.iter().all(|&t| (t as usize) < tokenizer.vocab_size()));
                prop_assert_eq!(tokenizer.decode(&tokens), text.as_str());
                prop_assert_eq!(streamed(&tokenizer, &tokens), text.as_str());
            }
        }

        #[test]
        fn streaming_any_bytes_equals_decoding_them(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let tokens: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).collect();
            prop_assert_eq!(streamed(&Tokenizer::Byte, &tokens), Tokenizer::Byte.decode(&tokens));
        }

        #[test]
        fn streaming_any_tokens_equals_decoding_them(tokens in prop::collection::vec(0u32..50300, 0..40)) {
            prop_assert_eq!(streamed(&Tokenizer::Gpt2, &tokens), Tokenizer::Gpt2.decode(&tokens));
        }
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let mut decoder = StreamDecoder::new(&Tokenizer::Byte);
        let pieces: Vec<String> = "é!".bytes().map(|byte| decoder.push(byte.into())).collect();
        assert_eq!(pieces, ["", "é", "!"]);
    }

    #[test]
    fn gpt2_agrees_with_the_known_encoding() {
        assert_eq!(Tokenizer::Gpt2.encode("Hello world").unwrap(), [15496, 995]);
        assert_eq!(Tokenizer::Gpt2.decode(&[GPT2_END]), "<|endoftext|>");
    }

    #[test]
    fn markup_in_a_text_is_text() {
        for tokenizer in [Tokenizer::Gpt2, pairs()] {
            let tokens = tokenizer.encode("a<|endoftext|>b").unwrap();
            assert!(!tokens.contains(&tokenizer.end_token().unwrap()));
            assert_eq!(tokenizer.decode(&tokens), "a<|endoftext|>b");
        }
    }

    #[test]
    fn lengths_are_those_of_the_bytes() {
        for tokenizer in [Tokenizer::Byte, Tokenizer::Gpt2, pairs(), alphabet_of("naïve cab")] {
            let lengths = tokenizer.byte_lengths();
            let tokens = tokenizer.encode("naïve cab").unwrap();
            assert_eq!(tokens.iter().map(|token| lengths[*token as usize]).sum::<u32>(), 10);
            assert!(tokenizer.end_token().is_none_or(|end| lengths[end as usize] == 0));
        }
    }

    #[test]
    fn a_strange_character_is_named() {
        let error = alphabet_of("abc").encode("abé").unwrap_err().to_string();
        assert_eq!(error, "'é' (U+00E9) is not among the 3 characters of this alphabet");
    }

    #[test]
    fn a_saved_tokenizer_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        for tokenizer in [Tokenizer::Byte, Tokenizer::Gpt2, pairs(), alphabet_of("\n \"\\ab\u{1F600}")] {
            tokenizer.save(folder.path()).unwrap();
            assert_eq!(Tokenizer::load(folder.path()).unwrap(), tokenizer);
        }
    }

    #[test]
    fn damaged_tokenizer_files_are_refused() {
        let cases = [
            ("", "not a tokenizer"),
            ("{\"kind\":\"byte\"", "not a tokenizer"),
            ("{\"kind\":\"word\"}", "unknown tokenizer `word`"),
            ("{\"kind\":\"char\"}", "needs its `alphabet`"),
            ("{\"kind\":\"char\",\"alphabet\":\"\"}", "different characters"),
            ("{\"kind\":\"char\",\"alphabet\":\"ba\"}", "different characters"),
            ("{\"kind\":\"char\",\"alphabet\":\"aa\"}", "different characters"),
            ("{\"kind\":\"byte\",\"alphabet\":\"a\"}", "has no `alphabet`"),
            ("{\"kind\":\"byte\",\"more\":1}", "unknown field"),
            ("{\"kind\":\"byte\",\"tokenizer\":{}}", "has no `tokenizer`"),
            ("{\"kind\":\"bpe\"}", "needs its `tokenizer`"),
            (
                "{\"kind\":\"bpe\",\"tokenizer\":{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}}",
                "lacks the token",
            ),
        ];
        let folder = tempfile::tempdir().unwrap();
        for (text, message) in cases {
            std::fs::write(folder.path().join(TOKENIZER_FILE), text).unwrap();
            let error = Tokenizer::load(folder.path()).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
