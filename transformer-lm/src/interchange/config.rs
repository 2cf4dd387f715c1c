//! `config.json`: what GPT-2's implementation in `transformers` can vary, and which of it this model is.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tch::Kind;

use crate::config::{ModelSection, VocabSize};
use crate::data::Tokenizer;
use crate::model::{LAYER_NORM_EPS, Positions, TransformerLM};
use crate::{Error, Result};

/// The file's name.
const FILE: &str = "config.json";

/// Names of the tanh form of GELU, which is ours.
const TANH_GELU: [&str; 3] = ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"];

/// What a GPT-2's `config.json` says, with the library's defaults; what does not change the model is not read.
#[derive(Debug, Deserialize)]
struct Gpt2Config {
    model_type: Option<String>,
    #[serde(default = "Gpt2Config::vocab_size")]
    vocab_size: usize,
    #[serde(default = "Gpt2Config::n_positions")]
    n_positions: usize,
    #[serde(default = "Gpt2Config::n_embd")]
    n_embd: usize,
    #[serde(default = "Gpt2Config::twelve")]
    n_layer: usize,
    #[serde(default = "Gpt2Config::twelve")]
    n_head: usize,
    n_inner: Option<usize>,
    #[serde(default = "Gpt2Config::dropout")]
    resid_pdrop: f64,
    #[serde(default = "Gpt2Config::dropout")]
    embd_pdrop: f64,
    #[serde(default = "Gpt2Config::dropout")]
    attn_pdrop: f64,
    pad_token_id: Option<i64>,
}

impl Gpt2Config {
    fn vocab_size() -> usize {
        50257
    }
    fn n_positions() -> usize {
        1024
    }
    fn n_embd() -> usize {
        768
    }
    fn twelve() -> usize {
        12
    }
    fn dropout() -> f64 {
        0.1
    }
}

/// Reads `config.json`: the model's section, and notes on what it cannot say.
pub(super) fn read(folder: &Path) -> Result<(ModelSection, Vec<String>)> {
    let path = folder.join(FILE);
    let refuse = |detail: String| Error::data(&path, detail);
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let value: Value = serde_json::from_slice(&text).map_err(|error| refuse(format!("not valid JSON: {error}")))?;
    let parse = |value: &Value| Gpt2Config::deserialize(value);
    let config = parse(&value).map_err(|error| refuse(format!("not the configuration of a GPT-2: {error}")))?;
    check_kind(&config, &value).map_err(refuse)?;
    let section = section_of(&config).map_err(refuse)?;
    let rates = [config.resid_pdrop, config.embd_pdrop, config.attn_pdrop];
    let mut notes = Vec::new();
    if rates.iter().any(|rate| *rate != rates[0]) {
        let [resid, embd, attn] = rates;
        notes.push(format!("resid_pdrop {resid}, embd_pdrop {embd}, attn_pdrop {attn}: dropout is {resid} everywhere"));
    }
    Ok((section, notes))
}

/// Refuses another model, and what this model cannot do.
fn check_kind(config: &Gpt2Config, value: &Value) -> std::result::Result<(), String> {
    match config.model_type.as_deref() {
        Some("gpt2") => {}
        Some(other) => return Err(format!("model_type is \"{other}\"; only \"gpt2\" can be read")),
        None => return Err("model_type is missing; expected \"gpt2\"".into()),
    }
    let activation = value.get("activation_function").unwrap_or(&Value::Null);
    if !(activation.is_null() || activation.as_str().is_some_and(|name| TANH_GELU.contains(&name))) {
        return Err(format!("activation_function is {activation}; this model has {}", TANH_GELU.join(" = ")));
    }
    let epsilon = value.get("layer_norm_epsilon").map_or(Some(LAYER_NORM_EPS), Value::as_f64);
    if epsilon != Some(LAYER_NORM_EPS) {
        return Err(format!(
            "layer_norm_epsilon is {}; this model has {LAYER_NORM_EPS:e}",
            value["layer_norm_epsilon"]
        ));
    }
    let fixed = [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
        ("tie_word_embeddings", true),
    ];
    for (key, ours) in fixed {
        let found = value.get(key).unwrap_or(&Value::Null);
        if !(found.is_null() || *found == json!(ours)) {
            return Err(format!("{key} is {found}; this model has {ours}"));
        }
    }
    match value.get("quantization_config") {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err("the weights are quantized (quantization_config); expected 16, 32 or 64-bit floats".into()),
    }
}

fn section_of(config: &Gpt2Config) -> std::result::Result<ModelSection, String> {
    let sizes = [
        ("vocab_size", config.vocab_size, 2),
        ("n_positions", config.n_positions, 2),
        ("n_embd", config.n_embd, 1),
        ("n_layer", config.n_layer, 1),
        ("n_head", config.n_head, 1),
        ("n_inner", config.n_inner.unwrap_or(1), 1),
    ];
    for (name, size, least) in sizes {
        if size < least || size > (i32::MAX / 4) as usize {
            return Err(format!("{name} is {size}; expected {least} to {}", i32::MAX / 4));
        }
    }
    if !config.n_embd.is_multiple_of(config.n_head) {
        return Err(format!("n_head = {} does not divide n_embd = {}", config.n_head, config.n_embd));
    }
    if !(0.0..1.0).contains(&config.resid_pdrop) {
        return Err(format!("resid_pdrop is {}; expected 0 or more and less than 1", config.resid_pdrop));
    }
    let is_token = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < config.vocab_size);
    Ok(ModelSection {
        d_model: config.n_embd,
        n_heads: config.n_head,
        n_layers: config.n_layer,
        d_ff: config.n_inner.unwrap_or(4 * config.n_embd),
        dropout: config.resid_pdrop,
        max_seq_len: config.n_positions,
        positions: Positions::Learned,
        vocab_size: VocabSize::Fixed(config.vocab_size),
        pad_token_id: config.pad_token_id.filter(is_token),
    })
}

/// Writes `config.json` for a model.
pub(super) fn write(model: &TransformerLM, tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    let shape = model.config();
    let end = tokenizer.end_token();
    let config = json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.max_seq_len,
        "n_embd": shape.d_model,
        "n_layer": shape.n_layers,
        "n_head": shape.n_heads,
        "n_inner": shape.d_ff,
        "activation_function": TANH_GELU[0],
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "initializer_range": 0.02,
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.dropout,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": shape.pad_token_id,
        "tie_word_embeddings": true,
        "torch_dtype": if model.kind() == Kind::Double { "float64" } else { "float32" },
    });
    write_json(&folder.join(FILE), &config)
}

/// Writes a file of the folder.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::data(path, error.to_string()))?;
    std::fs::write(path, text + "\n").map_err(Error::io("write", path))
}
