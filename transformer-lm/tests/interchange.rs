//! `lm export` and `lm import`: there and back, folders that are no GPT-2, and `transformers` itself (`tests/pytorch/gpt2.py`).

mod support;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use support::{distance, lively_model, python};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use transformer_lm::checkpoint::{CheckpointState, Contents, FORMAT_VERSION, save_checkpoint, verify};
use transformer_lm::data::{PrepareOptions, Tokenizer, TokenizerKind, prepare};
use transformer_lm::generate::load_model_for_generation;
use transformer_lm::interchange::import_hf;
use transformer_lm::model::{copy_weights, read_weights};
use transformer_lm::{Config, TransformerLM};

const TEXT: &str = "the king and the queen, the crown\nnaïve kings' swords 12 é\n\n  and <|endoftext|> the\tend";

/// A folder with a checkpoint `model`.
struct Lab {
    folder: TempDir,
}

impl Lab {
    fn new(tokenizer: TokenizerKind, positions: &str) -> Lab {
        let lab = Lab { folder: tempfile::tempdir().unwrap() };
        std::fs::write(lab.path("text.txt"), TEXT.repeat(20)).unwrap();
        let options = PrepareOptions {
            input: vec![lab.path("text.txt")],
            output: lab.path("data"),
            tokenizer,
            vocab_size: 300,
            ..PrepareOptions::default()
        };
        let vocab_size = prepare(&options).unwrap().vocab_size.next_multiple_of(8); // some rows stand for no token
        let yaml = format!(
            "model: {{d_model: 16, n_heads: 4, n_layers: 2, d_ff: 24, max_seq_len: 12, dropout: 0.25, pad_token_id: null, \
             positions: {positions}, vocab_size: {vocab_size}}}"
        );
        let config = Config::from_yaml(&yaml, "lab").unwrap();
        let (_store, model) = lively_model(&config.model_config(0), Kind::Float);
        let state = CheckpointState { format_version: FORMAT_VERSION, global_step: 7, ..CheckpointState::default() };
        let contents = Contents {
            model: &model.parameters(),
            optimizer: &[],
            state: &state,
            config: &config,
            tokenizer: Some(&lab.path("data/tokenizer.json")),
        };
        save_checkpoint(lab.folder.path(), "model", &contents).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn export(&self, checkpoint: &str, output: &str) -> Output {
        lm(&["export", "--format", "hf", "--checkpoint", checkpoint, "--output", output], self.folder.path())
    }

    fn import(&self, input: &str, output: &str) -> Output {
        lm(&["import", "--format", "hf", "--input", input, "--output", output], self.folder.path())
    }

    fn load(&self, checkpoint: &str) -> (TransformerLM, Tokenizer, Config) {
        load_model_for_generation(self.path(checkpoint), None, Device::Cpu).unwrap()
    }

    /// All names in the folder.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn lm<T: AsRef<OsStr>>(args: &[T], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lm")).args(args).current_dir(folder).env("OMP_NUM_THREADS", "1").output().unwrap()
}

fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const TOKENIZERS: [TokenizerKind; 4] =
    [TokenizerKind::Byte, TokenizerKind::Char, TokenizerKind::Bpe, TokenizerKind::Gpt2];

/// Token ids (2, T).
fn some_ids(vocabulary: usize, t: usize) -> Tensor {
    let ids: Vec<i64> = (0..2 * t).map(|i| (i * i * 7 % vocabulary) as i64).collect();
    Tensor::from_slice(&ids).view([2, t as i64])
}

fn logits(model: &TransformerLM, ids: &Tensor) -> Tensor {
    tch::no_grad(|| model.forward_t(ids, None, None, false)).unwrap().0
}

#[test]
fn a_model_comes_back_as_it_was() {
    for tokenizer in TOKENIZERS {
        let lab = Lab::new(tokenizer, "learned");
        succeeded(lab.export("model", "hf"));
        let text = succeeded(lab.import("hf", "back"));
        assert!(text.contains("d_model: 16") && !text.contains("note"), "{text}");
        let (model, tokenizer, config) = lab.load("model");
        let (back, same_tokenizer, same_config) = lab.load("back");
        assert_eq!((same_tokenizer, same_config.model), (tokenizer, config.model));
        for ((name, ours), (same_name, same)) in model.parameters().into_iter().zip(back.parameters()) {
            assert_eq!(name, same_name);
            assert_eq!(ours, same, "{name}");
        }
        assert_eq!(verify(&lab.path("back")).unwrap().global_step, 0);
        assert_eq!(lab.names(), ["back", "data", "hf", "model", "text.txt"]);
    }
}

#[test]
fn sinusoidal_positions_become_a_table() {
    let lab = Lab::new(TokenizerKind::Byte, "sinusoidal");
    succeeded(lab.export("model", "hf"));
    succeeded(lab.import("hf", "back"));
    let ((model, ..), (back, ..)) = (lab.load("model"), lab.load("back"));
    assert_eq!(back.parameters().len(), model.parameters().len() + 1);
    let ids = some_ids(256, 12);
    assert_eq!(logits(&back, &ids), logits(&model, &ids));
}

#[test]
fn a_model_in_several_files_without_prefix_and_with_masks_is_read() {
    let lab = Lab::new(TokenizerKind::Byte, "learned");
    succeeded(lab.export("model", "hf"));
    let weights = read_weights(&lab.path("hf/model.safetensors")).unwrap();
    let mut weights: Vec<(String, Tensor)> =
        weights.into_iter().map(|(name, tensor)| (name.replace("transformer.", ""), tensor)).collect();
    let embedding = weights.iter().find(|(name, _)| name == "wte.weight").unwrap().1.shallow_clone();
    weights.push(("lm_head.weight".into(), embedding));
    weights.push(("h.0.attn.bias".into(), Tensor::ones([1, 1, 12, 12], (Kind::Bool, Device::Cpu)).tril(0)));
    std::fs::remove_file(lab.path("hf/model.safetensors")).unwrap();
    let (first, second) = weights.split_at(5);
    let parts = [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)];
    let mut map = serde_json::Map::new();
    for (file, part) in parts {
        Tensor::write_safetensors(part, lab.path("hf").join(file)).unwrap();
        map.extend(part.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    std::fs::write(lab.path("hf/model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    succeeded(lab.import("hf", "back"));
    let ids = some_ids(256, 12);
    assert_eq!(logits(&lab.load("back").0, &ids), logits(&lab.load("model").0, &ids));
}

/// The older files of a tokenizer say the same as `tokenizer.json`.
#[test]
fn vocabulary_and_merges_are_a_tokenizer() {
    for kind in [TokenizerKind::Bpe, TokenizerKind::Gpt2] {
        let lab = Lab::new(kind, "learned");
        succeeded(lab.export("model", "hf"));
        let description = read_json(&lab.path("hf/tokenizer.json"));
        let merges = description["model"]["merges"].as_array().unwrap();
        let rule = |pair: &Value| format!("{} {}\n", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
        let rules: String = merges.iter().map(rule).collect();
        std::fs::write(lab.path("hf/merges.txt"), format!("#version: 0.2\n{rules}")).unwrap();
        std::fs::write(lab.path("hf/vocab.json"), description["model"]["vocab"].to_string()).unwrap();
        std::fs::remove_file(lab.path("hf/tokenizer.json")).unwrap();
        succeeded(lab.import("hf", "back"));
        let (ours, back) = (lab.load("model").1, lab.load("back").1);
        assert_eq!(back.name(), ours.name());
        assert_eq!(back.vocab_size(), ours.vocab_size());
        assert_eq!(back.encode(TEXT).unwrap(), ours.encode(TEXT).unwrap());
    }
}

#[test]
fn without_a_tokenizer_there_is_a_note() {
    let lab = Lab::new(TokenizerKind::Byte, "learned");
    succeeded(lab.export("model", "hf"));
    std::fs::remove_file(lab.path("hf/tokenizer.json")).unwrap();
    let text = succeeded(lab.import("hf", "back"));
    assert!(text.contains("note: no tokenizer in the folder"), "{text}");
    verify(&lab.path("back")).unwrap();
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Sets a key of an exported `config.json`.
fn set_in(path: &Path, key: &str, value: Value) {
    let mut config = read_json(path);
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

/// Changes the exported weights.
fn reweigh(lab: &Lab, change: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let path = lab.path("hf/model.safetensors");
    let mut weights = read_weights(&path).unwrap();
    change(&mut weights);
    Tensor::write_safetensors(&weights, path).unwrap();
}

fn zeros(kind: Kind) -> Tensor {
    Tensor::zeros([256, 16], (kind, Device::Cpu))
}

type Spoil = Box<dyn Fn(&Lab)>;

/// What is done to an exported folder, and what is said of it.
fn hostile_folders() -> Vec<(Spoil, &'static str)> {
    let config = |key: &'static str, value: Value, says: &'static str| -> (Spoil, &'static str) {
        (Box::new(move |lab| set_in(&lab.path("hf/config.json"), key, value.clone())), says)
    };
    let file = |name: &'static str, text: &'static str, says: &'static str| -> (Spoil, &'static str) {
        (Box::new(move |lab| std::fs::write(lab.path("hf").join(name), text).unwrap()), says)
    };
    let gone = |name: &'static str, says: &'static str| -> (Spoil, &'static str) {
        (Box::new(move |lab| std::fs::remove_file(lab.path("hf").join(name)).unwrap()), says)
    };
    let index = |text: &'static str, says: &'static str| -> (Spoil, &'static str) {
        let spoil = move |lab: &Lab| {
            std::fs::remove_file(lab.path("hf/model.safetensors")).unwrap();
            std::fs::write(lab.path("hf/model.safetensors.index.json"), text).unwrap();
        };
        (Box::new(spoil), says)
    };
    let without = |name: &'static str, says: &'static str| -> (Spoil, &'static str) {
        (Box::new(move |lab| reweigh(lab, |weights| weights.retain(|(other, _)| other != name))), says)
    };
    let with = |name: &'static str, kind: Kind, says: &'static str| -> (Spoil, &'static str) {
        let add = move |weights: &mut Vec<(String, Tensor)>| {
            weights.retain(|(other, _)| other != name);
            weights.push((name.into(), zeros(kind)));
        };
        (Box::new(move |lab| reweigh(lab, add)), says)
    };
    vec![
        gone("config.json", "config.json"),
        file("config.json", "{", "not valid JSON"),
        file("config.json", "[]", "not the configuration of a GPT-2"),
        config("model_type", json!("llama"), "model_type is \"llama\"; only \"gpt2\""),
        config("model_type", Value::Null, "model_type is missing"),
        config("n_embd", json!("wide"), "not the configuration of a GPT-2"),
        config("n_embd", json!(-16), "not the configuration of a GPT-2"),
        config("n_embd", json!(0), "n_embd is 0"),
        config("n_embd", json!(1u64 << 40), "n_embd is 1099511627776; expected 1 to"),
        config("n_embd", json!(18), "n_head = 4 does not divide n_embd = 18"),
        config("n_embd", json!(32), "transformer.wte.weight has shape [256, 16]; config.json asks for [256, 32]"),
        config("n_layer", json!(500_000_000), "the tensor transformer.h.2.ln_1.weight is missing"),
        config("n_layer", json!(1), "transformer.h.1.attn.c_attn.bias is no part of the GPT-2"),
        config("n_inner", Value::Null, "h.0.mlp.c_fc.weight has shape [16, 24]; config.json asks for [16, 64]"),
        config("n_positions", json!(1), "n_positions is 1; expected 2"),
        config("n_positions", json!(1_000_000), "transformer.wpe.weight has shape [12, 16]"),
        config("vocab_size", json!(255), "transformer.wte.weight has shape [256, 16]"),
        config("activation_function", json!("relu"), "activation_function is \"relu\""),
        config("activation_function", json!("gelu"), "activation_function is \"gelu\""),
        config("layer_norm_epsilon", json!(1e-6), "layer_norm_epsilon is"),
        config("scale_attn_weights", json!(false), "scale_attn_weights is false"),
        config("scale_attn_by_inverse_layer_idx", json!(true), "scale_attn_by_inverse_layer_idx is true"),
        config("add_cross_attention", json!(true), "add_cross_attention is true"),
        config("tie_word_embeddings", json!(false), "tie_word_embeddings is false"),
        config("quantization_config", json!({"bits": 4}), "the weights are quantized"),
        config("resid_pdrop", json!(1.0), "resid_pdrop is 1"),
        gone("model.safetensors", "there is no model.safetensors in it"),
        file("model.safetensors", "nothing like it", "not a whole safetensors file"),
        index("{", "not valid JSON"),
        index("{}", "has no weight_map"),
        index("{\"weight_map\": {\"wte.weight\": \"../secret\"}}", "\"../secret\", which is no file of this folder"),
        index("{\"weight_map\": {\"wte.weight\": 7}}", "weight_map names 7"),
        index("{\"weight_map\": {\"wte.weight\": \"gone.safetensors\"}}", "gone.safetensors"),
        without("transformer.wte.weight", "the tensor transformer.wte.weight is missing"),
        without("transformer.h.1.mlp.c_proj.bias", "the tensor transformer.h.1.mlp.c_proj.bias is missing"),
        with("transformer.wte.weight", Kind::Int64, "transformer.wte.weight holds Int64"),
        with("lm_head.weight", Kind::Float, "lm_head.weight is not transformer.wte.weight"),
        with("score.weight", Kind::Float, "score.weight is no part of the GPT-2"),
        file("tokenizer.json", "{", "not valid JSON"),
        file("tokenizer.json", "{}", "not a byte-level byte-pair encoding"),
        file("tokenizer.json", "{\"model\": {\"type\": \"WordPiece\"}}", "not a byte-level byte-pair encoding"),
    ]
}

#[test]
fn what_is_no_gpt2_is_refused_and_leaves_nothing() {
    let lab = Lab::new(TokenizerKind::Byte, "learned");
    succeeded(lab.export("model", "whole"));
    let names = lab.names();
    for (spoil, says) in hostile_folders() {
        std::fs::create_dir(lab.path("hf")).unwrap();
        for entry in std::fs::read_dir(lab.path("whole")).unwrap().flatten() {
            std::fs::copy(entry.path(), lab.path("hf").join(entry.file_name())).unwrap();
        }
        spoil(&lab);
        let error = import_hf(&lab.path("hf"), &lab.path("back")).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
        std::fs::remove_dir_all(lab.path("hf")).unwrap();
        assert_eq!(lab.names(), names, "{says}");
    }
    set_in(&lab.path("whole/config.json"), "model_type", json!("bert"));
    let output = lab.import("whole", "back");
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.starts_with("error: ") && error.contains("model_type is \"bert\""), "{error}");
}

/// GPT-2's tokens, but a space before the first word: other tokens for the same text.
#[test]
fn a_tokenizer_with_other_rules_is_not_taken_for_ours() {
    let lab = Lab::new(TokenizerKind::Gpt2, "learned");
    succeeded(lab.export("model", "hf"));
    let mut description = read_json(&lab.path("hf/tokenizer.json"));
    description["pre_tokenizer"]["add_prefix_space"] = true.into();
    std::fs::write(lab.path("hf/tokenizer.json"), description.to_string()).unwrap();
    succeeded(lab.import("hf", "back"));
    let (ours, theirs) = (lab.load("model").1, lab.load("back").1);
    assert_eq!(theirs.encode("word").unwrap(), ours.encode(" word").unwrap());
    assert_ne!(theirs.encode("word").unwrap(), ours.encode("word").unwrap());
}

#[test]
fn a_tokenizer_larger_than_the_model_is_refused() {
    let lab = Lab::new(TokenizerKind::Byte, "learned");
    succeeded(lab.export("model", "hf"));
    let other = Lab::new(TokenizerKind::Bpe, "learned");
    succeeded(other.export("model", "hf"));
    std::fs::copy(other.path("hf/tokenizer.json"), lab.path("hf/tokenizer.json")).unwrap();
    let error = String::from_utf8(lab.import("hf", "back").stderr).unwrap();
    assert!(error.contains("tokens, and the model only 256"), "{error}");
}

#[test]
fn a_folder_that_holds_something_stays_as_it_is() {
    let lab = Lab::new(TokenizerKind::Byte, "learned");
    for output in ["data", "text.txt", "model"] {
        let refused = lab.export("model", output);
        let error = String::from_utf8(refused.stderr).unwrap();
        assert!(!refused.status.success() && error.contains("is there already"), "{error}");
    }
    succeeded(lab.export("model", "hf"));
    let refused = lab.import("hf", "data");
    assert!(String::from_utf8(refused.stderr).unwrap().contains("is there already"));
    std::fs::create_dir(lab.path("empty")).unwrap();
    succeeded(lab.import("hf", "empty"));
    assert_eq!(lab.names(), ["data", "empty", "hf", "model", "text.txt"]);
    assert!(lab.path("data/train.bin").is_file());
    for (input, says) in [("nowhere", "there is no such folder"), ("data", "config.json")] {
        let error = String::from_utf8(lab.import(input, "back").stderr).unwrap();
        assert!(error.contains(says), "{error}");
    }
    let error = String::from_utf8(lab.export("nowhere", "back").stderr).unwrap();
    assert!(error.contains("there is no such folder"), "{error}");
}

#[test]
fn an_imported_model_is_trained_on_and_not_resumed() {
    let lab = Lab::new(TokenizerKind::Byte, "learned");
    succeeded(lab.export("model", "hf"));
    succeeded(lab.import("hf", "back"));
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/finetune.yaml");
    let shape = ["d_model=16", "n_heads=4", "n_layers=2", "d_ff=24", "max_seq_len=12", "vocab_size=256", "dropout=0"];
    let sets = ["data.data_dir=data", "training.max_steps=2", "training.amp_dtype=fp32", "training.device=cpu"];
    let train = |more: &[&str]| {
        let mut args = ["train", "--config", config, "--output-dir", "runs"].map(String::from).to_vec();
        args.extend(shape.iter().flat_map(|set| ["--set".to_string(), format!("model.{set}")]));
        args.extend(sets.iter().flat_map(|set| ["--set", set]).chain(more.iter().copied()).map(String::from));
        lm(&args, lab.folder.path())
    };
    let started = succeeded(train(&["--set", "training.init_from=back", "--set", "training.learning_rate=1e-30"]));
    assert!(started.contains("done"), "{started}");
    let ids = some_ids(256, 12);
    assert!(distance(&logits(&lab.load("runs").0, &ids), &logits(&lab.load("back").0, &ids)) < 1e-5);
    let error = String::from_utf8(train(&["--resume", "back"]).stderr).unwrap();
    assert!(error.contains("it was imported") && error.contains("training.init_from"), "{error}");
}

/// `transformers`' logits of a folder, for these ids.
fn their_logits(python: &Path, lab: &Lab, folder: &str, ids: &Tensor) -> Tensor {
    Tensor::write_safetensors(&[("ids", ids)], lab.path("ids")).unwrap();
    let paths = [lab.path(folder), lab.path("ids"), lab.path("logits")];
    let args: Vec<_> = std::iter::once("logits".into()).chain(paths.map(PathBuf::into_os_string)).collect();
    python::run(python, "gpt2.py", &args);
    read_weights(&lab.path("logits")).unwrap().remove(0).1
}

#[test]
fn transformers_computes_the_same_with_an_exported_model() {
    let Some(python) = python::python() else { return };
    for positions in ["learned", "sinusoidal"] {
        let lab = Lab::new(TokenizerKind::Char, positions);
        succeeded(lab.export("model", "hf"));
        let model = lab.load("model").0;
        let ids = some_ids(model.config().vocab_size, 12);
        let error = distance(&logits(&model, &ids), &their_logits(&python, &lab, "hf", &ids));
        println!("exported, {positions} positions: logits differ by {error:.1e}");
        assert!(error < 1e-4, "{error}");
    }
}

#[test]
fn we_compute_the_same_with_a_model_of_transformers() {
    let Some(python) = python::python() else { return };
    for (dtype, shard_size) in [("float32", "1GB"), ("float32", "20KB"), ("bfloat16", "1GB")] {
        let lab = Lab::new(TokenizerKind::Byte, "learned");
        let folder = lab.path("theirs").into_os_string();
        python::run(&python, "gpt2.py", &["make".into(), folder, "5".into(), dtype.into(), shard_size.into()]);
        succeeded(lab.import("theirs", "back"));
        let config = Config::load(Some(&lab.path("back/config.yaml")), &[]).unwrap();
        let store = VarStore::new(Device::Cpu);
        let model = TransformerLM::blank(&store.root(), &config.model_config(0)).unwrap();
        let weights = lab.path("back/model.safetensors");
        copy_weights(&model, read_weights(&weights).unwrap(), &weights).unwrap();
        let ids = some_ids(97, 24);
        let error = distance(&logits(&model, &ids), &their_logits(&python, &lab, "theirs", &ids));
        println!("imported, {dtype}, files of {shard_size}: logits differ by {error:.1e}");
        assert!(error < 1e-4, "{error}");
    }
}

#[test]
fn transformers_reads_every_exported_tokenizer() {
    let Some(python) = python::python() else { return };
    for kind in TOKENIZERS {
        let lab = Lab::new(kind, "learned");
        succeeded(lab.export("model", "hf"));
        let texts = ["the king and the queen", TEXT.split("<|").next().unwrap(), " the end\n\n  and the  ", "é"];
        let lines: String = texts.iter().map(|text| format!("{}\n", json!(text))).collect();
        std::fs::write(lab.path("texts"), lines).unwrap();
        let paths = [lab.path("hf"), lab.path("texts"), lab.path("tokens")];
        let args: Vec<_> = std::iter::once("tokens".into()).chain(paths.map(PathBuf::into_os_string)).collect();
        python::run(&python, "gpt2.py", &args);
        let theirs = std::fs::read_to_string(lab.path("tokens")).unwrap();
        let tokenizer = lab.load("model").1;
        for (text, line) in texts.iter().zip(theirs.lines()) {
            let ids: Vec<u32> = serde_json::from_str(line).unwrap();
            assert_eq!(ids, tokenizer.encode(text).unwrap(), "{}: {text:?}", tokenizer.name());
        }
    }
}
