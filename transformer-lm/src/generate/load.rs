//! A model out of a checkpoint.

use std::path::Path;

use tch::{Device, Kind, Tensor, nn};

use crate::checkpoint::resolve_whole;
use crate::data::{TOKENIZER_FILE, Tokenizer};
use crate::model::{TransformerLM, copy_weights, read_weights};
use crate::{Config, Error, Result, load_config};

/// Reads a checkpoint's model, tokenizer and configuration.
///
/// `checkpoint` may also be a run's folder, whose best checkpoint is then taken, or else its newest
/// ([`resolve_whole`] tells which). `config` replaces the checkpoint's own `config.yaml`.
///
/// # Errors
/// No checkpoint, one that is damaged, or one that does not fit the configuration.
pub fn load_model_for_generation(
    checkpoint: impl AsRef<Path>,
    config: Option<&Path>,
    device: Device,
) -> Result<(TransformerLM, Tokenizer, Config)> {
    let folder = resolve_whole(checkpoint.as_ref())?;
    let config = load_config(config.map_or_else(|| folder.join("config.yaml"), Path::to_path_buf))?;
    if !folder.join(TOKENIZER_FILE).exists() {
        let hint = "hint: where it was imported without one, copy it from a folder that `lm prepare` made with the model's tokenizer";
        return Err(Error::checkpoint(&folder, format!("{TOKENIZER_FILE} is missing\n{hint}")));
    }
    let tokenizer = Tokenizer::load(&folder)?;
    let source = folder.join("model.safetensors");
    let model = read_model(&source, &config, &tokenizer, device)?;
    Ok((model, tokenizer, config))
}

fn read_model(source: &Path, config: &Config, tokenizer: &Tokenizer, device: Device) -> Result<TransformerLM> {
    let shape = config.model_config(tokenizer.vocab_size());
    if shape.vocab_size < tokenizer.vocab_size() {
        let (model, tokens) = (shape.vocab_size, tokenizer.vocab_size());
        return Err(Error::data(source, format!("a vocabulary of {model} for a tokenizer of {tokens} tokens")));
    }
    let weights = read_weights(source)?;
    let mut store = nn::VarStore::new(device);
    store.set_kind(kind_of(&weights));
    let model = TransformerLM::blank(&store.root(), &shape)?;
    copy_weights(&model, weights, source)?;
    Ok(model)
}

/// A model trained in f64 stays so; every other computes in f32.
fn kind_of(weights: &[(String, Tensor)]) -> Kind {
    if weights.iter().any(|(_, weight)| weight.kind() == Kind::Double) { Kind::Double } else { Kind::Float }
}
