//! Checkpoints: folders that are either whole or not there.
//!
//! ```text
//! runs/20260131_093000_demo/        the run's folder
//!   checkpoint_epoch1_step500/      every `save_interval` updates; the newest `keep_checkpoints` stay
//!   checkpoint_epoch1/              at the end of an epoch
//!   best_model/                     lowest validation loss so far
//!   final_model/                    the last one
//!   superseded/                     later ones than a resume went on from
//!     model.safetensors             weights
//!     optimizer.safetensors         AdamW's moments and step counts
//!     state.json                    position, figures and the checksums of the other files
//!     config.yaml                   the configuration, with the vocabulary's size filled in
//!     tokenizer.json                of the data that the model was trained on
//! ```
//!
//! A checkpoint is written into a folder `.tmp-…` beside, synced to disk, then renamed. So a folder with one of the names above
//! is whole whatever happened meanwhile, and a damaged disk shows in the checksums.

mod files;
mod find;
mod saver;
mod state;

use std::path::{Path, PathBuf};

use hvd_torch::Optimizer;
use tch::Tensor;

use crate::config::Config;
use crate::model::{TransformerLM, read_weights, write_weights};
use crate::{Error, Result};

pub use files::{clean_leftovers, write_atomically};
pub(crate) use files::{publish, sync_all};
pub use find::{Found, find_newest, prune, resolve, resolve_whole, set_aside_later};
pub(crate) use saver::REMOVAL;
pub use saver::{Saver, Snapshot};
pub use state::{CheckpointState, FORMAT_VERSION, GuardState, ScalerState, read_state, verify};

/// What goes into a checkpoint.
#[derive(Debug)]
pub struct Contents<'a> {
    /// The model's parameters by name.
    pub model: &'a [(String, Tensor)],
    /// The optimizer's state by name.
    pub optimizer: &'a [(String, Tensor)],
    /// Where training stands.
    pub state: &'a CheckpointState,
    /// The configuration of the run.
    pub config: &'a Config,
    /// The tokenizer's file, copied as it is.
    pub tokenizer: Option<&'a Path>,
}

/// Writes the checkpoint `folder/name`, replacing one of that name in a single step.
///
/// # Errors
/// [`Error::Io`] or [`Error::Torch`]; then no trace of it is left and an older one of that name is as it was.
pub fn save_checkpoint(folder: &Path, name: &str, contents: &Contents) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let temporary = folder.join(format!(".tmp-{name}-{}", std::process::id()));
    let target = folder.join(name);
    let written = write(&temporary, contents).and_then(|()| files::publish(&temporary, &target));
    if written.is_err() {
        let _ = std::fs::remove_dir_all(&temporary);
    }
    written.map(|()| target)
}

fn write(folder: &Path, contents: &Contents) -> Result<()> {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir(folder).map_err(Error::io("create", folder))?;
    write_weights(&folder.join("model.safetensors"), contents.model)?;
    write_weights(&folder.join("optimizer.safetensors"), contents.optimizer)?;
    contents.config.save(folder.join("config.yaml"))?;
    if let Some(tokenizer) = contents.tokenizer {
        std::fs::copy(tokenizer, folder.join("tokenizer.json")).map_err(Error::io("copy", tokenizer))?;
    }
    state::write_state(folder, contents.state)?;
    files::sync_all(folder)
}

/// Checks the checkpoint in the folder `path`, then copies it into `model` and `optimizer`. Nothing is changed where it
/// does not fit.
///
/// # Errors
/// [`Error::Checkpoint`] where it is not whole (a checksum, a missing file) or of another model.
pub fn load_checkpoint<O: Optimizer>(path: &Path, model: &TransformerLM, optimizer: &mut O) -> Result<CheckpointState> {
    let Loaded { state, weights, moments } = read_checkpoint(path, model)?;
    optimizer.load_state(&moments).map_err(|error| Error::checkpoint(path, error.to_string()))?;
    crate::model::copy_weights(model, weights, path)?;
    Ok(state)
}

/// What a checkpoint holds.
#[derive(Debug)]
pub struct Loaded {
    /// Where training stands.
    pub state: CheckpointState,
    /// The model's parameters by name.
    pub weights: Vec<(String, Tensor)>,
    /// The optimizer's state by name.
    pub moments: Vec<(String, Tensor)>,
}

/// Checks the checkpoint in the folder `path` and reads it.
///
/// # Errors
/// [`Error::Checkpoint`] where it is not whole (a checksum, a missing file) or of another model.
pub fn read_checkpoint(path: &Path, model: &TransformerLM) -> Result<Loaded> {
    let state = verify(path)?;
    let weights = read_weights(&path.join("model.safetensors"))?;
    let moments = read_weights(&path.join("optimizer.safetensors"))?;
    check_shapes(&model.parameters(), &weights).map_err(|detail| Error::checkpoint(path, detail))?;
    Ok(Loaded { state, weights, moments })
}

/// Whether `weights` are those of a model with these parameters.
fn check_shapes(parameters: &[(String, Tensor)], weights: &[(String, Tensor)]) -> std::result::Result<(), String> {
    let hint = "was it trained with another `model` section?";
    for (name, parameter) in parameters {
        let Some((_, weight)) = weights.iter().find(|(other, _)| other == name) else {
            return Err(format!("`{name}` is missing; {hint}"));
        };
        if (weight.size(), weight.kind()) != (parameter.size(), parameter.kind()) {
            let (found, expected) = (weight.size(), parameter.size());
            let (kind, wanted) = (weight.kind(), parameter.kind());
            return Err(format!(
                "`{name}` is {kind:?} {found:?}, the configuration asks for {wanted:?} {expected:?}; {hint}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
