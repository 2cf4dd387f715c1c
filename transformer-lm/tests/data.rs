//! `prepare`, the shards it makes, shards that are damaged or hostile, and how loaders deal them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tch::{Device, Tensor};
use tempfile::TempDir;
use transformer_lm::data::shard::HEADER_BYTES;
use transformer_lm::data::{
    LoaderConfig, PrepareOptions, TokenizerKind, get_dataloaders, load_preprocessed_data, prepare, verify,
};

fn options(folder: &Path, texts: &[(&str, &[u8])], tokenizer: TokenizerKind) -> PrepareOptions {
    let write = |(name, text): &(&str, &[u8])| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    PrepareOptions {
        input: texts.iter().map(write).collect(),
        tokenizer,
        output: folder.join("out"),
        val_fraction: 0.25,
        ..PrepareOptions::default()
    }
}

/// A data folder of `tokens` bytes; byte `i` is `i % 251`.
fn prepared(tokens: usize, val_fraction: f64) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let text: Vec<u8> = (0..tokens).map(|i| (i % 251) as u8).collect();
    let options = options(folder.path(), &[("text", &text)], TokenizerKind::Byte);
    prepare(&PrepareOptions { val_fraction, ..options.clone() }).unwrap();
    (folder, options.output)
}

fn config(data_dir: &Path, rank: usize, size: usize) -> LoaderConfig {
    LoaderConfig {
        data_dir: data_dir.into(),
        seq_len: 5,
        global_batch: 24,
        micro_batch: 1,
        rank,
        size,
        seed: 3,
        device: Device::Cpu,
    }
}

fn rows(batch: &Tensor) -> Vec<Vec<i64>> {
    Vec::<Vec<i64>>::try_from(batch).unwrap()
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn texts_are_joined_by_name_and_cut_in_two() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), &[("b.txt", b"world!"), ("a.txt", b"Hello\n")], TokenizerKind::Byte);
    let summary = prepare(&options).unwrap();
    assert_eq!((summary.files, summary.bytes, summary.train_tokens, summary.val_tokens), (2, 12, 9, 3));
    assert_eq!(summary.documents, 2);
    let data = load_preprocessed_data(&options.output).unwrap();
    assert_eq!(data.vocab_size, 256);
    let text = |tokens: Vec<i64>| data.tokenizer.decode(&tokens.iter().map(|&t| t as u32).collect::<Vec<_>>());
    assert_eq!(text(data.train.block(8, 0).unwrap()), "Hello\nwor");
    assert_eq!(text(data.val.block(2, 0).unwrap()), "ld!");
}

/// The text that a folder's tokens stand for.
fn text_of(folder: &Path) -> String {
    let data = load_preprocessed_data(folder).unwrap();
    let mut tokens = Vec::new();
    for part in [&data.train, &data.val] {
        part.read(0, part.tokens() as usize, &mut tokens).unwrap();
    }
    data.tokenizer.decode(&tokens.into_iter().map(|token| token as u32).collect::<Vec<_>>())
}

const KINDS: [TokenizerKind; 4] = [TokenizerKind::Byte, TokenizerKind::Char, TokenizerKind::Gpt2, TokenizerKind::Bpe];

#[test]
fn preparing_twice_gives_the_same_bytes_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    for tokenizer in KINDS {
        let text = "To be, or not to be: that is the quéstion. ".repeat(20);
        let options = options(folder.path(), &[("text", text.as_bytes())], tokenizer);
        let options = PrepareOptions { overwrite: true, vocab_size: 300, ..options };
        let first = (prepare(&options).unwrap(), contents(&options.output));
        let second = (prepare(&PrepareOptions { threads: 1, ..options.clone() }).unwrap(), contents(&options.output));
        assert_eq!(first, second);
        assert_eq!(first.1.keys().collect::<Vec<_>>(), ["tokenizer.json", "train.bin", "val.bin"]);
        let end = if first.0.tokenizer.len() == 4 && first.0.tokenizer != "gpt2" { "" } else { "<|endoftext|>" };
        assert_eq!(text_of(&options.output), text + end);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn documents_are_set_apart() {
    let folder = tempfile::tempdir().unwrap();
    let lines = "{\"body\": \"one\\n\", \"n\": 1}\n\n{\"body\": \"twö\"}\n{\"body\": \"\"}\n{\"body\": \"three\"}";
    let texts: [(&str, &[u8]); 3] = [("a.jsonl", lines.as_bytes()), ("b.txt", b"four"), ("c.txt", b"five")];
    for tokenizer in KINDS {
        let options =
            PrepareOptions { field: "body".into(), overwrite: true, ..options(folder.path(), &texts, tokenizer) };
        let summary = prepare(&options).unwrap();
        assert_eq!((summary.files, summary.documents), (3, 5));
        let expected = match tokenizer {
            TokenizerKind::Byte | TokenizerKind::Char => "one\ntwö\nthree\nfour\nfive".to_string(),
            _ => ["one\n", "twö", "three", "four", "five"].map(|text| format!("{text}<|endoftext|>")).concat(),
        };
        assert_eq!(text_of(&options.output), expected);
    }
}

#[test]
fn a_byte_pair_encoding_has_as_many_tokens_as_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..3000).map(|i| format!("word{} ", i * i % 997)).collect();
    let options = options(folder.path(), &[("text", text.as_bytes())], TokenizerKind::Bpe);
    for vocab_size in [257, 300, 600] {
        let options = PrepareOptions { vocab_size, overwrite: true, ..options.clone() };
        let summary = prepare(&options).unwrap();
        assert_eq!(summary.vocab_size, vocab_size);
        assert_eq!(load_preprocessed_data(&options.output).unwrap().vocab_size, vocab_size);
    }
    let tokens = |vocab_size| {
        let summary = prepare(&PrepareOptions { vocab_size, overwrite: true, ..options.clone() }).unwrap();
        summary.train_tokens + summary.val_tokens
    };
    assert!(tokens(600) * 2 < tokens(257));
}

#[test]
fn several_shards_read_as_one() {
    let (whole, _) = prepared(1000, 0.3);
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read(whole.path().join("text")).unwrap();
    let options = options(folder.path(), &[("text", &text)], TokenizerKind::Byte);
    let options = PrepareOptions { val_fraction: 0.3, shard_tokens: 150, overwrite: true, ..options };
    prepare(&options).unwrap();
    prepare(&options).expect("shards can be replaced");
    let names: Vec<String> = contents(&options.output).into_keys().collect();
    assert_eq!(names.iter().filter(|name| name.starts_with("train-0000")).count(), 5);
    assert!(names.contains(&"val-00001-of-00002.bin".to_string()), "{names:?}");
    let data = load_preprocessed_data(&options.output).unwrap();
    let single = load_preprocessed_data(whole.path().join("out")).unwrap();
    assert_eq!(data.train.tokens(), single.train.tokens());
    for seq_len in [7, 149, 150, 151, 400] {
        for block in 0..data.train.blocks(seq_len) {
            assert_eq!(data.train.block(seq_len, block).unwrap(), single.train.block(seq_len, block).unwrap());
        }
    }
    let shard = |index: usize| options.output.join(format!("train-{index:05}-of-00005.bin"));
    for (a, b) in [(0, 1), (1, 3), (2, 4)] {
        let exchange = || {
            std::fs::rename(shard(a), shard(9)).unwrap();
            std::fs::rename(shard(b), shard(a)).unwrap();
            std::fs::rename(shard(9), shard(b)).unwrap();
        };
        exchange();
        let error = verify(&options.output).unwrap_err().to_string();
        assert!(error.contains("shards were exchanged"), "{a} {b}: {error}");
        exchange();
        verify(&options.output).unwrap();
    }
    std::fs::remove_file(options.output.join("train-00003-of-00005.bin")).unwrap();
    let error = load_preprocessed_data(&options.output).unwrap_err().to_string();
    assert!(error.contains("train-00003-of-00005.bin"), "{error}");
}

#[test]
fn what_was_prepared_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let text = "A line of text, quite lóng.\n".repeat(100_000);
    let texts: [(&str, &[u8]); 2] = [("a.txt", text.as_bytes()), ("b.txt", b"and more")];
    for tokenizer in KINDS {
        let options = PrepareOptions { overwrite: true, vocab_size: 280, ..options(folder.path(), &texts, tokenizer) };
        let summary = prepare(&options).unwrap();
        let verified = verify(&options.output).unwrap();
        assert_eq!((verified.checksum, verified.bytes), (summary.checksum, text.len() as u64 + 8));
        assert_eq!((verified.train_tokens, verified.val_tokens), (summary.train_tokens, summary.val_tokens));
    }
}

#[test]
fn batches_read_ahead_are_those_read_when_asked_for() {
    let (_folder, data) = prepared(1000, 0.1);
    let (train, _) = get_dataloaders(&config(&data, 1, 2)).unwrap();
    let flat = |batches: Vec<Tensor>| batches.iter().flat_map(rows).collect::<Vec<_>>();
    for workers in [0, 1, 3] {
        let ahead = train.stream(2, 5, workers).take(10).map(|batches| flat(batches.unwrap()));
        let positions = (5..7).map(|step| (2, step)).chain((0..7).map(|step| (3, step))).chain([(4, 0)]);
        let direct: Vec<_> = positions.map(|(epoch, step)| flat(train.step(epoch, step).unwrap())).collect();
        assert_eq!(ahead.collect::<Vec<_>>(), direct, "{workers} threads");
    }
}

#[test]
fn what_cannot_be_prepared_is_refused_and_leaves_nothing() {
    let (folder, empty) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let good = options(folder.path(), &[("text", b"some text that is long enough")], TokenizerKind::Byte);
    let with = |name: &str, text: &[u8], tokenizer| {
        let input = options(folder.path(), &[(name, text)], tokenizer).input;
        PrepareOptions { input, tokenizer, ..good.clone() }
    };
    let cases = [
        (with("empty", b"", TokenizerKind::Byte), "the input is empty"),
        (with("short", b"abc", TokenizerKind::Byte), "each part needs 2"),
        (with("latin", b"caf\xe9 au lait", TokenizerKind::Char), "no UTF-8 at byte 3"),
        (with("latin", b"caf\xe9 au lait", TokenizerKind::Gpt2), "use --tokenizer byte"),
        (PrepareOptions { input: vec![folder.path().join("nowhere")], ..good.clone() }, "nowhere: No such file"),
        (PrepareOptions { input: vec![empty.path().into()], ..good.clone() }, "no text file here"),
        (with("bad1.jsonl", b"{\"text\": \"a\"}\nnonsense\n", TokenizerKind::Byte), "line 2: not JSON"),
        (with("bad2.jsonl", b"{\"txt\": \"a\"}", TokenizerKind::Byte), "line 1: no field `text` among [\"txt\"]"),
        (with("bad3.jsonl", b"{\"text\": 3}", TokenizerKind::Byte), "its field `text` is 3"),
        (with("bad4.jsonl", b"[]", TokenizerKind::Byte), "not a JSON object"),
        (PrepareOptions { vocab_size: 100, ..with("text", b"some text", TokenizerKind::Bpe) }, "at least 257"),
        (PrepareOptions { shard_tokens: 0, ..good.clone() }, "--shard-tokens 0"),
        (PrepareOptions { val_fraction: 1.0, ..good.clone() }, "--val-fraction 1"),
        (PrepareOptions { val_fraction: f64::NAN, ..good.clone() }, "--val-fraction NaN"),
        (PrepareOptions { output: good.input[0].clone(), ..good.clone() }, "a file is in the way"),
    ];
    for (options, message) in cases {
        let error = prepare(&options).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        let hidden = |name: &String| name.starts_with('.');
        let names = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let names: Vec<String> = names.collect();
        assert!(!names.iter().any(hidden) && !names.contains(&"out".into()), "{names:?}");
    }
}

#[test]
fn only_prepared_data_is_ever_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), &[("text", b"some text that is long enough")], TokenizerKind::Byte);
    let forced = PrepareOptions { overwrite: true, ..options.clone() };
    std::fs::create_dir(&options.output).unwrap();
    prepare(&options).expect("an empty folder is free");
    assert!(prepare(&options).unwrap_err().to_string().contains("--overwrite"));
    prepare(&forced).unwrap();
    let letter = options.output.join("letter.txt");
    std::fs::write(&letter, "precious").unwrap();
    assert!(prepare(&forced).unwrap_err().to_string().contains("something else than prepared data"));
    assert_eq!(std::fs::read(&letter).unwrap(), b"precious");
    std::fs::remove_file(&letter).unwrap();
    std::fs::write(options.output.join("train.bin"), "no shard").unwrap();
    assert!(prepare(&forced).is_err());
}

/// Puts the right checksum behind a header that was tampered with.
fn seal(bytes: &mut [u8]) {
    let checksum = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
}

fn set(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
    seal(bytes);
}

#[test]
fn damaged_and_hostile_shards_are_refused() {
    type Damage = fn(&mut Vec<u8>);
    let cases: [(Damage, &str); 17] = [
        (|b| b.clear(), "truncated"),
        (|b| b.truncate(HEADER_BYTES - 1), "truncated"),
        (|b| b.truncate(HEADER_BYTES), "truncated or overlong"),
        (|b| b.truncate(b.len() - 1), "truncated or overlong"),
        (|b| b.push(0), "truncated or overlong"),
        (|b| b[0] = b'X', "wrong magic"),
        (|b| b[20] ^= 1, "damaged header"),
        (|b| b[HEADER_BYTES + 4] ^= 1, "damaged (wrong checksum)"),
        (|b| set(b, 8, &2u32.to_le_bytes()), "version 2"),
        (|b| set(b, 12, &3u32.to_le_bytes()), "3 bytes per token"),
        (|b| set(b, 12, &4u32.to_le_bytes()), "truncated or overlong"),
        (|b| set(b, 16, &0u64.to_le_bytes()), "a vocabulary of 0"),
        (|b| set(b, 16, &u64::MAX.to_le_bytes()), "a vocabulary of 18446744073709551615"),
        (|b| set(b, 24, &u64::MAX.to_le_bytes()), "truncated or overlong"),
        (|b| set(b, 24, &(1u64 << 63).to_le_bytes()), "truncated or overlong"),
        (|b| set(b, 40, &[0xff]), "no text"),
        (|b| set(b, 40, b"gpt2"), "made with tokenizer gpt2"),
    ];
    for (damage, message) in cases {
        for name in ["train.bin", "val.bin"] {
            let (_folder, data) = prepared(400, 0.5);
            let mut bytes = std::fs::read(data.join(name)).unwrap();
            damage(&mut bytes);
            std::fs::write(data.join(name), bytes).unwrap();
            let error = load_preprocessed_data(&data).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains(name), "{message}: {error}");
        }
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error_when_it_is_read() {
    let (_folder, data) = prepared(400, 0.5);
    let path = data.join("train.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[HEADER_BYTES + 2 * 7..HEADER_BYTES + 2 * 8].copy_from_slice(&256u16.to_le_bytes());
    let checksum = u64::from(crc32fast::hash(&bytes[HEADER_BYTES..]));
    set(&mut bytes, 32, &checksum.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let train = load_preprocessed_data(&data).unwrap().train;
    assert!(train.batch(5, &[0]).is_ok());
    let error = train.batch(5, &[0, 1]).unwrap_err().to_string();
    assert!(error.contains("token 256 at 7 is outside the vocabulary of 256"), "{error}");
}

#[test]
fn missing_parts_are_named() {
    for name in ["train.bin", "val.bin", "tokenizer.json"] {
        let (_folder, data) = prepared(400, 0.5);
        std::fs::remove_file(data.join(name)).unwrap();
        assert!(load_preprocessed_data(&data).unwrap_err().to_string().contains(name));
    }
    assert!(load_preprocessed_data("no/such/folder").unwrap_err().to_string().contains("lm prepare"));
}

#[test]
fn blocks_overlap_by_one_token() {
    let (_folder, data) = prepared(64, 0.5);
    let train = load_preprocessed_data(&data).unwrap().train;
    assert_eq!((train.tokens(), train.predictions(), train.blocks(5)), (32, 31, 6));
    assert_eq!(train.block(5, 0).unwrap(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(train.block(5, 5).unwrap(), [25, 26, 27, 28, 29, 30]);
    assert_eq!(train.block(5, 6).unwrap(), [30, 31]);
    assert!(train.block(5, 7).is_err() && train.block(5, u64::MAX).is_err());
    assert!(train.batch(5, &[6]).is_err() && train.batch(5, &[]).is_err());
}

#[test]
fn every_held_out_token_counts_once_on_any_number_of_ranks() {
    // Of 1000 tokens, the last ones; byte 0 of the held-out part is not predicted.
    for held_out in [2, 5, 6, 7, 11, 26, 101, 249] {
        let (_folder, data) = prepared(1000, f64::from(held_out) / 1000.0);
        for size in 1..=8 {
            let mut predicted = Vec::new();
            for rank in 0..size {
                let config = LoaderConfig { global_batch: size, ..config(&data, rank, size) };
                let (_, val) = get_dataloaders(&config).unwrap();
                for batch in val.batches() {
                    predicted.extend(rows(&batch.unwrap()).into_iter().flat_map(|row| row[1..].to_vec()));
                }
                assert_eq!(val.total_predictions(), load_preprocessed_data(&data).unwrap().val.predictions());
            }
            let first = 1000 - load_preprocessed_data(&data).unwrap().val.tokens() as i64;
            let expected: Vec<i64> = (first + 1..1000).map(|i| i % 251).collect();
            assert_eq!(predicted, expected, "{held_out} tokens, {size} ranks");
        }
    }
}

#[test]
fn a_global_batch_is_the_same_on_any_number_of_ranks() {
    let (_folder, data) = prepared(1000, 0.1);
    let global = |size: usize, micro_batch, epoch, step| {
        let mut sequences = Vec::new();
        for rank in 0..size {
            let (train, _) = get_dataloaders(&LoaderConfig { micro_batch, ..config(&data, rank, size) }).unwrap();
            assert_eq!(train.steps_per_epoch(), 179 / 24);
            let batches = train.step(epoch, step).unwrap();
            assert_eq!(batches.len(), 24 / size / micro_batch);
            sequences.extend(batches.iter().flat_map(rows));
        }
        sequences.sort();
        sequences
    };
    for (epoch, step) in [(0, 0), (0, 6), (5, 3)] {
        let alone = global(1, 24, epoch, step);
        for (size, micro_batch) in [(1, 6), (2, 4), (3, 8), (4, 1), (8, 3)] {
            assert_eq!(global(size, micro_batch, epoch, step), alone);
        }
    }
    assert_ne!(global(1, 24, 0, 0), global(1, 24, 1, 0));
    let mut epoch: Vec<_> = (0..7).flat_map(|step| global(1, 24, 0, step)).collect();
    epoch.sort();
    epoch.dedup();
    assert_eq!(epoch.len(), 7 * 24);
}

#[test]
fn batches_that_cannot_be_dealt_are_refused() {
    let (_folder, data) = prepared(1000, 0.1);
    let good = config(&data, 0, 2);
    let cases = [
        (LoaderConfig { micro_batch: 5, ..good.clone() }, "expected a multiple of 10"),
        (LoaderConfig { size: 5, ..good.clone() }, "cannot be dealt to 5 ranks"),
        (LoaderConfig { rank: 2, ..good.clone() }, "impossible"),
        (LoaderConfig { seq_len: 0, ..good.clone() }, "impossible"),
        (
            LoaderConfig { global_batch: 200, ..good.clone() },
            "too few for a global batch of 200 (at least 1001 tokens)",
        ),
        (LoaderConfig { seq_len: 1 << 40, ..good.clone() }, "too few"),
    ];
    for (config, message) in cases {
        let error = get_dataloaders(&config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let (train, _) = get_dataloaders(&good).unwrap();
    assert!(train.step(0, train.steps_per_epoch()).is_err());
}
