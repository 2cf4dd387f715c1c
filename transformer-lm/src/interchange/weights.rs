//! Weights under GPT-2's names and in its layout, in one safetensors file or several.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::layout::{Entry, entries};
use crate::model::{ModelConfig, TransformerLM, not_written, read_weights};
use crate::{Error, Result};

/// The file of a model that is kept in one.
pub(super) const FILE: &str = "model.safetensors";

/// Names the files of a model that is kept in several.
const INDEX: &str = "model.safetensors.index.json";

/// What the tensors of a model with a head are below.
const PREFIX: &str = "transformer.";

/// The head; GPT-2's is the embedding again.
const HEAD: &str = "lm_head.weight";

/// Writes the model's weights.
pub(super) fn write(model: &TransformerLM, path: &Path) -> Result<()> {
    let mut parameters: HashMap<String, Tensor> = model.parameters().into_iter().collect();
    parameters.entry("wpe.weight".into()).or_insert_with(|| model.positions());
    let stored = entries(model.config()).map(|entry| {
        let missing = || Error::data(path, format!("the model has no {}", entry.name));
        let tensor = parameters.remove(&entry.name).ok_or_else(missing)?.detach();
        Ok((format!("{PREFIX}{}", entry.name), Stored::of(&if entry.is_dense { tensor.tr() } else { tensor })?))
    });
    let stored: Vec<(String, Stored)> = stored.collect::<Result<_>>()?;
    if let Some(name) = parameters.keys().next() {
        return Err(Error::data(path, format!("GPT-2 has no place for the model's {name}")));
    }
    let views = stored.iter().map(|(name, stored)| {
        let view = TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes);
        view.map(|view| (name.as_str(), view)).map_err(|error| Error::data(path, error.to_string()))
    });
    let views: Vec<_> = views.collect::<Result<_>>()?;
    // `transformers` refuses a file that does not say so.
    let metadata = Some(HashMap::from([("format".to_string(), "pt".to_string())]));
    serialize_to_file(views, &metadata, path).map_err(|error| not_written(path, error))
}

/// A tensor as bytes.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn of(tensor: &Tensor) -> Result<Stored> {
        let tensor = tensor.contiguous();
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        let shape = tensor.size().into_iter().map(|size| size as usize).collect();
        Ok(Stored { dtype: tensor.kind().try_into()?, shape, bytes })
    }
}

/// The weights of a model of this shape, under our names, in our layout, in f32.
pub(super) fn read(folder: &Path, shape: &ModelConfig) -> Result<Vec<(String, Tensor)>> {
    let mut found = HashMap::new();
    for path in files(folder)? {
        for (name, tensor) in read_weights(&path)? {
            found.insert(name, tensor);
        }
    }
    let refuse = |detail: String| Error::data(folder, detail);
    let mut found = Found(found);
    let weights = entries(shape).map(|entry| found.take(entry)).collect::<std::result::Result<Vec<_>, _>>();
    let weights = weights.map_err(refuse)?;
    found.check_rest(&weights[0].1).map_err(refuse)?;
    Ok(weights)
}

/// The safetensors files of a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (folder.join(FILE), folder.join(INDEX));
    if single.is_file() {
        return Ok(vec![single]);
    }
    if !index.is_file() {
        let hint = if folder.join("pytorch_model.bin").is_file() {
            "; it has only pytorch_model.bin: load it with transformers and save it with save_pretrained"
        } else {
            ""
        };
        return Err(Error::data(folder, format!("there is no {FILE} in it{hint}")));
    }
    let text = std::fs::read(&index).map_err(Error::io("read", &index))?;
    let refuse = |detail: &str| Error::data(&index, detail);
    let value: Value = serde_json::from_slice(&text).map_err(|error| refuse(&format!("not valid JSON: {error}")))?;
    let map = value["weight_map"].as_object().ok_or_else(|| refuse("it has no weight_map"))?;
    let is_name = |name: &&str| !name.contains('/');
    let names = map.values().map(|file| file.as_str().filter(is_name).ok_or(file));
    let names: BTreeSet<&str> = names
        .collect::<std::result::Result<_, _>>()
        .map_err(|file| refuse(&format!("weight_map names {file}, which is no file of this folder")))?;
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Tensors of a folder that have not been taken yet.
struct Found(HashMap<String, Tensor>);

impl Found {
    fn remove(&mut self, name: &str) -> Option<(String, Tensor)> {
        let prefixed = format!("{PREFIX}{name}");
        self.0.remove_entry(&prefixed).or_else(|| self.0.remove_entry(name))
    }

    fn take(&mut self, entry: Entry) -> std::result::Result<(String, Tensor), String> {
        let (name, tensor) =
            self.remove(&entry.name).ok_or_else(|| format!("the tensor {PREFIX}{} is missing", entry.name))?;
        if tensor.size() != entry.shape {
            return Err(format!("{name} has shape {:?}; config.json asks for {:?}", tensor.size(), entry.shape));
        }
        let tensor = as_float(&name, &tensor)?;
        Ok((entry.name, if entry.is_dense { tensor.tr().contiguous() } else { tensor }))
    }

    /// Nothing else may be there but the head, which must be the embedding, and masks, which older versions kept as weights.
    fn check_rest(mut self, embedding: &Tensor) -> std::result::Result<(), String> {
        if let Some((name, head)) = self.remove(HEAD)
            && (head.size() != embedding.size() || as_float(&name, &head)? != *embedding)
        {
            return Err(format!("{name} is not transformer.wte.weight; this model's head is its embedding"));
        }
        let is_mask = |name: &str| name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
        match self.0.keys().filter(|name| !is_mask(name)).min() {
            Some(name) => Err(format!("{name} is no part of the GPT-2 that config.json describes")),
            None => Ok(()),
        }
    }
}

fn as_float(name: &str, tensor: &Tensor) -> std::result::Result<Tensor, String> {
    match tensor.kind() {
        Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16 => Ok(tensor.to_kind(Kind::Float)),
        kind => Err(format!("{name} holds {kind:?}; expected 16, 32 or 64-bit floats")),
    }
}
