//! Data folders that are damaged, and texts that cannot be prepared.

use std::fs;
use std::path::Path;

use super::lab::{Damage, Lab, rewrite};

const TRAIN: &str = "data/train.bin";
const TOKENIZER: &str = "data/tokenizer.json";
const HEADER_BYTES: usize = 64;

/// A damage, and what is said of it.
type Case = (&'static str, Damage, &'static str);

/// Writes `value` into the training shard at byte `at`.
fn set(folder: &Path, at: usize, value: &[u8]) {
    rewrite(folder.join(TRAIN), |mut bytes| {
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    });
}

/// As [`set`], within the header, whose checksum is made right again.
fn forge(folder: &Path, at: usize, value: &[u8]) {
    set(folder, at, value);
    rewrite(folder.join(TRAIN), |mut bytes| {
        let checksum = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
        bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        bytes
    });
}

/// The last of the held-out tokens becomes one that there is none of, with all checksums right.
fn forge_token(folder: &Path) {
    let path = folder.join(TRAIN);
    let length = fs::metadata(&path).unwrap().len() as usize;
    set(folder, length - 2, &[0xff; 2]);
    let checksum = crc32fast::hash(&fs::read(&path).unwrap()[HEADER_BYTES..]);
    forge(folder, 32, &checksum.to_le_bytes());
}

const FOLDERS: &[Case] = &[
    ("no training part", |f| fs::remove_file(f.join(TRAIN)).unwrap(), "cannot read data/train.bin: No such file"),
    (
        "no held-out part",
        |f| fs::remove_file(f.join("data/val.bin")).unwrap(),
        "cannot read data/val.bin: No such file",
    ),
    ("no tokenizer", |f| fs::remove_file(f.join(TOKENIZER)).unwrap(), "cannot read data/tokenizer.json: No such file"),
    (
        "empty shard",
        |f| fs::write(f.join(TRAIN), "").unwrap(),
        "data/train.bin: truncated: shorter than a shard's header",
    ),
    ("header cut", |f| rewrite(f.join(TRAIN), |b| b[..63].to_vec()), "truncated: shorter than a shard's header"),
    ("cut", |f| rewrite(f.join(TRAIN), |b| b[..b.len() - 1].to_vec()), "data/train.bin: truncated or overlong"),
    ("overlong", |f| rewrite(f.join(TRAIN), |b| [&b[..], b"x"].concat()), "data/train.bin: truncated or overlong"),
    (
        "folder for a shard",
        |f| fs::remove_file(f.join(TRAIN)).and_then(|()| fs::create_dir(f.join(TRAIN))).unwrap(),
        "data/train.bin: not a file",
    ),
    ("pipe for a shard", pipe, "data/train.bin: not a file"),
    ("another file", |f| set(f, 0, b"PK"), "data/train.bin: not a token shard (wrong magic)"),
    ("of the future", |f| forge(f, 8, &[2]), "data/train.bin: version 2; this program reads 1"),
    ("flipped header", |f| set(f, 50, b"x"), "data/train.bin: damaged header (wrong checksum)"),
    ("odd width", |f| forge(f, 12, &[3]), "data/train.bin: 3 bytes per token; expected 2 or 4"),
    ("no vocabulary", |f| forge(f, 16, &[0; 8]), "data/train.bin: a vocabulary of 0 in 2 bytes per token"),
    ("vast vocabulary", |f| forge(f, 16, &[0xff; 8]), "a vocabulary of 18446744073709551615 in 2 bytes per token"),
    ("vast length", |f| forge(f, 24, &[0xff; 8]), "do not hold the 18446744073709551615 tokens it announces"),
    ("flipped token", |f| set(f, 100, &[0x99]), "data/train.bin: damaged (wrong checksum); run `lm prepare` again"),
    (
        "other name",
        |f| forge(f, 40, b"char\0"),
        "made with tokenizer char of 256 tokens, but the folder's is byte of 256",
    ),
    (
        "other tokenizer",
        |f| fs::write(f.join(TOKENIZER), r#"{"kind":"gpt2"}"#).unwrap(),
        "but the folder's is gpt2 of 50257",
    ),
    ("no tokenizer at all", |f| fs::write(f.join(TOKENIZER), "{").unwrap(), "data/tokenizer.json: not a tokenizer"),
    ("unknown tokenizer", |f| fs::write(f.join(TOKENIZER), r#"{"kind":"w"}"#).unwrap(), "unknown tokenizer `w`"),
    (
        "shard missing",
        |f| fs::rename(f.join(TRAIN), f.join("data/train-00000-of-00002.bin")).unwrap(),
        "cannot read data/train-00001-of-00002.bin",
    ),
];

fn pipe(folder: &Path) {
    let path = folder.join(TRAIN);
    fs::remove_file(&path).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn damaged_data_folders() {
    let mut lab = Lab::new();
    for (name, damage, message) in FOLDERS {
        lab.refuses_damaged(name, damage, "train --config config.yaml", 1, message);
    }
    lab.refuses_damaged(
        "forged",
        forge_token,
        "lm prepare --verify --output data",
        1,
        "is outside the vocabulary of 256",
    );
    lab.finish();
}

#[test]
fn texts_that_cannot_be_prepared() {
    let mut lab = Lab::new();
    let cases: &[(&str, &[u8], i32, &str)] = &[
        ("e.txt", b"", 2, "the input is empty; give --input files that hold text"),
        ("a.txt", b"a", 2, "0 tokens to train on and 1 held out; each part needs 2"),
        ("b.txt", b"ab\xff", 1, "b.txt: no UTF-8 at byte 2; convert it, or use --tokenizer byte"),
        ("a.jsonl", b"{\"text\": \"x\"}\n{", 1, "a.jsonl: line 2: not JSON"),
        ("b.jsonl", b"[]", 1, "b.jsonl: line 1: not a JSON object"),
        ("c.jsonl", b"{\"body\": \"x\"}", 1, "c.jsonl: line 1: no field `text` among [\"body\"]; name it by --field"),
        ("d.jsonl", b"{\"text\": 3}", 1, "d.jsonl: line 1: its field `text` is 3, expected a text"),
        ("e.jsonl", b"{\"text\": \"\\ud800\"}", 1, "e.jsonl: line 1: not JSON"),
        ("f.jsonl", b"\xff\n", 1, "f.jsonl: line 1: not JSON"),
    ];
    for (name, text, code, message) in cases {
        let damage = |folder: &Path| fs::write(folder.join(name), text).unwrap();
        let line = format!("lm prepare --tokenizer char --output o --input {name}");
        lab.refuses_damaged(name, damage, &line, *code, message);
    }
    lab.finish();
}

#[test]
fn what_a_tokenizer_lacks() {
    let mut lab = Lab::new();
    let chars = "--set data.data_dir=chars";
    lab.refuses(&format!("train --config config.yaml {chars} --resume runs"), 1, "no checkpoint here");
    lab.refuses(
        &format!("train --config config.yaml {chars} --set model.vocab_size=12 --set model.pad_token_id=null"),
        2,
        "model.vocab_size = 12, but the data in chars has tokens up to",
    );
    lab.finish();
}
