//! Weights from a file into a model, checked before the first is copied.

use std::collections::HashMap;
use std::path::Path;

use safetensors::SafeTensorError;
use tch::{TchError, Tensor};

use super::TransformerLM;
use crate::{Error, Result};

/// Reads a safetensors file.
///
/// # Errors
/// A missing, damaged or truncated file.
pub fn read_weights(path: &Path) -> Result<Vec<(String, Tensor)>> {
    std::fs::metadata(path).map_err(Error::io("read", path))?;
    Tensor::read_safetensors(path)
        .map_err(|error| Error::data(path, format!("not a whole safetensors file ({})", reason(path, &error))))
}

/// Writes a safetensors file; the tensors may lie in memory in any way.
///
/// # Errors
/// Where the file cannot be written.
pub fn write_weights(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let tensors: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.detach().contiguous())).collect();
    Tensor::write_safetensors(&tensors, path).map_err(|error| match error {
        TchError::SafeTensorError { err, .. } => not_written(path, err),
        error => Error::data(path, format!("cannot be written ({})", reason(path, &error))),
    })
}

/// Why the safetensors file at `path` could not be written; where the system refused, in its words.
pub(crate) fn not_written(path: &Path, error: SafeTensorError) -> Error {
    match error {
        SafeTensorError::IoError(error) => Error::io("write", path)(error),
        error => Error::data(path, format!("cannot be written: {error}")),
    }
}

/// What tch says, without the path that it says, too, and without a stack of calls.
fn reason(path: &Path, error: &tch::TchError) -> String {
    let text = error.to_string();
    let text = text.lines().next().unwrap_or_default();
    text.replace(&format!("safetensors error {}: ", path.display()), "")
}

/// Copies `weights` into the model's parameters, converting their element type. `source` is named in errors.
///
/// # Errors
/// A parameter that is missing, unknown or of another shape; the model is then unchanged.
pub fn copy_weights(model: &TransformerLM, weights: Vec<(String, Tensor)>, source: &Path) -> Result<()> {
    let mut weights: HashMap<String, Tensor> = weights.into_iter().collect();
    let mut pairs = Vec::new();
    for (name, parameter) in model.parameters() {
        let weight = weights.remove(&name).ok_or_else(|| Error::data(source, format!("`{name}` is missing")))?;
        if weight.size() != parameter.size() {
            let (found, expected) = (weight.size(), parameter.size());
            let text = format!("`{name}` has shape {found:?}, the configuration's model has {expected:?}");
            return Err(Error::data(source, text));
        }
        pairs.push((parameter, weight));
    }
    if let Some(name) = weights.keys().min() {
        return Err(Error::data(source, format!("`{name}` is no parameter of the configuration's model")));
    }
    tch::no_grad(|| pairs.iter_mut().try_for_each(|(parameter, weight)| parameter.f_copy_(weight)))?;
    Ok(())
}
