//! `state.json` of a checkpoint: where training stands, and the checksums of the other files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Malformed;

/// Layout of a checkpoint; one of another version is refused.
pub const FORMAT_VERSION: u32 = 1;

/// Without these a checkpoint cannot be resumed.
const REQUIRED: &[&str] = &["model.safetensors", "optimizer.safetensors", "config.yaml"];

/// Where training stands after an update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    /// [`FORMAT_VERSION`]; filled in when it is written.
    pub format_version: u32,
    /// Epochs that are over.
    pub epoch: u64,
    /// Updates done in the epoch after those: the position in the data, in global batches.
    pub step: u64,
    /// Updates since the start of training.
    pub global_step: u64,
    /// Loss of the last update, in nats per token.
    pub loss: Option<f64>,
    /// Lowest validation loss so far.
    pub best_val_loss: Option<f64>,
    /// The configuration's seed; order of the data and dropout follow from it and the position.
    pub seed: u64,
    /// Sequences per update; the position counts in these.
    pub global_batch_size: usize,
    /// Global batches of an epoch: tells when the data has changed.
    pub batches_per_epoch: u64,
    /// Ranks that wrote it. Another number may resume it.
    pub world_size: usize,
    /// Seconds of training so far.
    pub wall_time: f64,
    /// The loss scaler of fp16.
    pub scaler: Option<ScalerState>,
    /// What decides which updates are skipped.
    #[serde(default)]
    pub guard: GuardState,
    /// Validations since the one with the lowest loss.
    #[serde(default)]
    pub validations_since_best: u64,
    /// SHA-256 of every other file, in hexadecimal.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

/// Where the loss scaler of fp16 stands.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScalerState {
    /// The loss is multiplied by this before the backward pass.
    pub scale: f64,
    /// Updates since the last overflow.
    pub good_steps: u64,
}

/// What the guard against bad updates has seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuardState {
    /// Updates skipped since the start of training.
    pub skipped: u64,
    /// Updates skipped since the last one that was made.
    pub in_a_row: u64,
    /// The last losses, the oldest first.
    pub losses: Vec<f64>,
    /// The last gradient norms, the oldest first.
    pub norms: Vec<f64>,
}

impl CheckpointState {
    /// Reads the text of a `state.json`.
    ///
    /// # Errors
    /// Text that is no JSON, of another version, without a field, or with one of another type.
    pub fn from_json(text: &[u8]) -> Result<Self, Malformed> {
        let damaged = |error: serde_json::Error| Malformed(format!("state.json is damaged: {error}"));
        let value: serde_json::Value = serde_json::from_slice(text).map_err(damaged)?;
        match value.get("format_version").and_then(|version| version.as_u64()) {
            Some(version) if version == u64::from(FORMAT_VERSION) => {}
            version => {
                let version = version.map_or("none".to_string(), |version| version.to_string());
                return Err(format!("format_version is {version}, this program reads {FORMAT_VERSION}").into());
            }
        }
        serde_json::from_value(value).map_err(damaged)
    }

    /// Refuses a list of files that lacks one that every checkpoint has, or names one outside its folder.
    ///
    /// # Errors
    /// The file's name.
    pub fn check_files(&self) -> Result<(), Malformed> {
        if let Some(name) = REQUIRED.iter().find(|name| !self.files.contains_key(**name)) {
            return Err(format!("state.json does not list {name}").into());
        }
        match self.files.keys().find(|name| name.contains('/')) {
            Some(name) => Err(format!("state.json lists {name:?}, which is not a file of this folder").into()),
            None => Ok(()),
        }
    }

    /// Refuses a position in the data that no training comes to.
    ///
    /// # Errors
    /// The figures that do not fit together.
    pub fn check_position(&self) -> Result<(), Malformed> {
        let CheckpointState { epoch, step, global_step, batches_per_epoch, .. } = *self;
        let updates = epoch.checked_mul(batches_per_epoch).and_then(|updates| updates.checked_add(step));
        if step < batches_per_epoch && updates == Some(global_step) {
            return Ok(());
        }
        Err(format!(
            "state.json is damaged: {epoch} epochs of {batches_per_epoch} updates and {step} more are not {global_step}"
        )
        .into())
    }
}
