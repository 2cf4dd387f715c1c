//! Tokenizers in the format of the `tokenizers` library, as byte-pair encodings, with the very same tokens.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::write_json;
use crate::data::{Alphabet, BytePairs, GPT2_VOCABULARY, TOKENIZER_FILE, Tokenizer, symbol};
use crate::model::ModelConfig;
use crate::{Error, Result};

/// Writes `tokenizer.json` and `tokenizer_config.json`.
pub(super) fn write(tokenizer: &Tokenizer, shape: &ModelConfig, folder: &Path) -> Result<()> {
    write_json(&folder.join(TOKENIZER_FILE), &describe(tokenizer))?;
    let end = tokenizer.end_token().map(|token| tokenizer.decode(&[token]));
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_seq_len,
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": false,
    });
    write_json(&folder.join("tokenizer_config.json"), &config)
}

/// The folder's tokenizer, if it has one; without its files, one with GPT-2's number of tokens is GPT-2's.
pub(super) fn read(folder: &Path, shape: &ModelConfig, notes: &mut Vec<String>) -> Result<Option<Tokenizer>> {
    let Some((path, description)) = find(folder)? else {
        let is_gpt2 = shape.vocab_size == GPT2_VOCABULARY;
        notes.push(match is_gpt2 {
            true => "no tokenizer in the folder; 50257 tokens are taken for GPT-2's".into(),
            false => "no tokenizer in the folder: the checkpoint can be trained from, but not generate".into(),
        });
        return Ok(is_gpt2.then_some(Tokenizer::Gpt2));
    };
    let tokenizer = recognise(&description).map_err(|detail| Error::data(&path, detail))?;
    if tokenizer.vocab_size() > shape.vocab_size {
        let (tokens, rows) = (tokenizer.vocab_size(), shape.vocab_size);
        return Err(Error::data(&path, format!("it has {tokens} tokens, and the model only {rows}")));
    }
    Ok(Some(tokenizer))
}

/// `tokenizer.json`, or what it would be for `vocab.json` and `merges.txt`.
fn find(folder: &Path) -> Result<Option<(std::path::PathBuf, Value)>> {
    let text = |path: &Path| std::fs::read_to_string(path).map_err(Error::io("read", path));
    let parse = |path: &Path| -> Result<Value> {
        serde_json::from_str(&text(path)?).map_err(|error| Error::data(path, format!("not valid JSON: {error}")))
    };
    let (whole, vocab, merges) = (folder.join(TOKENIZER_FILE), folder.join("vocab.json"), folder.join("merges.txt"));
    if whole.is_file() {
        return Ok(Some((whole.clone(), parse(&whole)?)));
    }
    if !vocab.is_file() || !merges.is_file() {
        return Ok(None);
    }
    let rules = text(&merges)?;
    let rules = rules.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
    let description = byte_level(parse(&vocab)?, rules.map(Value::from).collect(), true, Some(GPT2_END));
    Ok(Some((vocab, description)))
}

/// GPT-2's end token, which others with its format have too.
const GPT2_END: &str = "<|endoftext|>";

fn describe(tokenizer: &Tokenizer) -> Value {
    match tokenizer {
        Tokenizer::Byte => {
            let vocabulary = (0..=255u8).map(|byte| (symbol(byte).to_string(), Value::from(byte)));
            byte_level(Value::Object(vocabulary.collect()), Vec::new(), false, None)
        }
        Tokenizer::Char(alphabet) => {
            let vocabulary = (0u32..).zip(alphabet.characters()).map(|(token, c)| (c.to_string(), Value::from(token)));
            pair_encoding(Value::Object(vocabulary.collect()), Vec::new(), json!({"decoder": {"type": "Fuse"}}))
        }
        Tokenizer::Gpt2 => {
            let (vocabulary, merges) = gpt2_pairs();
            byte_level(vocabulary, merges, true, Some(GPT2_END))
        }
        Tokenizer::Bpe(pairs) => pairs.description(),
    }
}

/// A byte-pair encoding over bytes; `splits` text by GPT-2's rule of what is a word.
fn byte_level(vocabulary: Value, merges: Vec<Value>, splits: bool, end: Option<&str>) -> Value {
    let level =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let added = end.and_then(|end| Some((end, vocabulary.get(end)?.clone()))).map(|(end, token)| {
        json!({"id": token, "content": end, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    });
    let parts = json!({"pre_tokenizer": level(splits), "decoder": level(true), "added_tokens": Vec::from_iter(added)});
    pair_encoding(vocabulary, merges, parts)
}

/// A description with these parts beside the vocabulary.
fn pair_encoding(vocabulary: Value, merges: Vec<Value>, parts: Value) -> Value {
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocabulary, "merges": merges,
    });
    let mut whole = Map::from_iter([("version".into(), json!("1.0")), ("model".into(), model)]);
    for part in ["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        whole.insert(part.into(), parts.get(part).cloned().unwrap_or(Value::Null));
    }
    whole.insert("added_tokens".into(), parts.get("added_tokens").cloned().unwrap_or(json!([])));
    Value::Object(whole)
}

/// GPT-2's vocabulary and merges. The program knows each token's bytes; its merge is that of the two tokens which the merges
/// before it leave of those bytes.
fn gpt2_pairs() -> (Value, Vec<Value>) {
    let end = GPT2_VOCABULARY as u32 - 1;
    let bytes: Vec<Vec<u8>> = (0..end).map(|token| Tokenizer::Gpt2.bytes_of(token).into_owned()).collect();
    let ranks: HashMap<&[u8], usize> = bytes.iter().enumerate().map(|(rank, bytes)| (&bytes[..], rank)).collect();
    let symbols = |bytes: &[u8]| -> String { bytes.iter().map(|byte| symbol(*byte)).collect() };
    let merge = |(rank, bytes): (usize, &Vec<u8>)| {
        let at = last_split(bytes, rank, &ranks)?;
        Some(json!([symbols(&bytes[..at]), symbols(&bytes[at..])]))
    };
    let merges = bytes.iter().enumerate().filter_map(merge).collect();
    let vocabulary = bytes.iter().map(|bytes| symbols(bytes)).chain([GPT2_END.to_string()]);
    (Value::Object(vocabulary.zip((0u32..).map(Value::from)).collect()), merges)
}

/// Where the token of these bytes was put together last: merges of a lower rank are done, the lowest first. None for a byte.
fn last_split(bytes: &[u8], rank: usize, ranks: &HashMap<&[u8], usize>) -> Option<usize> {
    let mut edges: Vec<usize> = (0..=bytes.len()).collect();
    while edges.len() > 3 {
        let pair = |window: &[usize]| ranks.get(&bytes[window[0]..window[2]]).copied().filter(|merged| *merged < rank);
        let lowest = edges.windows(3).enumerate().filter_map(|(at, window)| Some((pair(window)?, at))).min()?;
        edges.remove(lowest.1 + 1);
    }
    (edges.len() == 3).then(|| edges[1])
}

/// Which tokenizer a `tokenizer.json` describes.
fn recognise(description: &Value) -> std::result::Result<Tokenizer, String> {
    let model = &description["model"];
    let same = |ours: &Tokenizer| {
        let described = describe(ours);
        described["model"]["vocab"] == model["vocab"]
            && model["merges"] == json!([])
            && has_rules_of(&described, description)
    };
    let characters = model["vocab"].as_object().map(|vocab| vocab.keys().filter_map(|token| one_character(token)));
    let alphabet = Alphabet::new(&characters.map(BTreeSet::from_iter).unwrap_or_default());
    for simple in [Tokenizer::Byte, Tokenizer::Char(alphabet)] {
        if same(&simple) {
            return Ok(simple);
        }
    }
    let pairs = BytePairs::from_description(description)
        .map_err(|error| format!("not a byte-level byte-pair encoding as GPT-2's: {error}"))?;
    let is_gpt2 = has_rules_of(&byte_level(gpt2_pairs().0, Vec::new(), true, Some(GPT2_END)), description)
        && has_gpt2_pairs(&pairs);
    Ok(if is_gpt2 { Tokenizer::Gpt2 } else { Tokenizer::Bpe(pairs.into()) })
}

/// Whether two descriptions agree in all that decides how a text is cut and put together, besides vocabulary and merges.
fn has_rules_of(one: &Value, other: &Value) -> bool {
    let rules = |of: &Value| {
        let level = &of["pre_tokenizer"];
        let words = (level["type"].clone(), level["add_prefix_space"].clone(), level["use_regex"] != json!(false));
        let added = of["added_tokens"].as_array().map(|tokens| Vec::from_iter(tokens.iter().map(id_and_content)));
        (of["normalizer"].clone(), words, of["decoder"]["type"].clone(), added.unwrap_or_default())
    };
    rules(one) == rules(other)
}

fn id_and_content(token: &Value) -> (Value, Value) {
    (token["id"].clone(), token["content"].clone())
}

fn one_character(token: &str) -> Option<char> {
    let mut characters = token.chars();
    characters.next().filter(|_| characters.next().is_none())
}

/// Whether these are the tokens and merges that the program carries.
fn has_gpt2_pairs(pairs: &BytePairs) -> bool {
    let model = &pairs.description()["model"];
    let size = model["vocab"].as_object().map_or(0, Map::len);
    size == GPT2_VOCABULARY && {
        let (vocabulary, merges) = gpt2_pairs();
        model["vocab"] == vocabulary && model["merges"] == Value::Array(merges)
    }
}
