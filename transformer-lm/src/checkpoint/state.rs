//! `state.json`: where training stands, and the checksums that tell a whole checkpoint from a damaged one.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Layout of a checkpoint; one of another version is refused.
pub const FORMAT_VERSION: u32 = 1;

const NAME: &str = "state.json";
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

/// Writes `state.json` with the checksums of the files that are in `folder` now.
pub(super) fn write_state(folder: &Path, state: &CheckpointState) -> Result<()> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))?.flatten() {
        files.insert(entry.file_name().to_string_lossy().into_owned(), sha256(&entry.path())?);
    }
    let state = CheckpointState { format_version: FORMAT_VERSION, files, ..state.clone() };
    let path = folder.join(NAME);
    let text = serde_json::to_vec_pretty(&state).map_err(|error| Error::checkpoint(folder, error.to_string()))?;
    std::fs::write(&path, text).map_err(Error::io("write", &path))
}

/// Reads `state.json` of a checkpoint without looking at the other files.
///
/// # Errors
/// [`Error::Checkpoint`].
pub fn read_state(path: &Path) -> Result<CheckpointState> {
    let refuse = |detail: String| Error::checkpoint(path, detail);
    let text = std::fs::read(path.join(NAME)).map_err(|error| refuse(format!("cannot read {NAME}: {error}")))?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| refuse(format!("{NAME} is damaged: {error}")))?;
    match value.get("format_version").and_then(|version| version.as_u64()) {
        Some(version) if version == u64::from(FORMAT_VERSION) => {}
        version => {
            let version = version.map_or("none".to_string(), |version| version.to_string());
            return Err(refuse(format!("format_version is {version}, this program reads {FORMAT_VERSION}")));
        }
    }
    serde_json::from_value(value).map_err(|error| refuse(format!("{NAME} is damaged: {error}")))
}

/// Reads `state.json` and compares every file with its checksum.
///
/// # Errors
/// [`Error::Checkpoint`] that says which file is missing or damaged.
pub fn verify(path: &Path) -> Result<CheckpointState> {
    let refuse = |detail: String| Error::checkpoint(path, detail);
    if !path.is_dir() {
        return Err(refuse("there is no such folder".into()));
    }
    let state = read_state(path)?;
    if let Some(name) = REQUIRED.iter().find(|name| !state.files.contains_key(**name)) {
        return Err(refuse(format!("{NAME} does not list {name}")));
    }
    for (name, expected) in &state.files {
        if name.contains('/') {
            return Err(refuse(format!("{NAME} lists {name:?}, which is not a file of this folder")));
        }
        let file = path.join(name);
        if !file.is_file() {
            return Err(refuse(format!("{name} is missing")));
        }
        if sha256(&file)? != *expected {
            return Err(refuse(format!("{name} is damaged: its SHA-256 is not the one in {NAME}")));
        }
    }
    Ok(state)
}

fn sha256(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match std::io::Read::read(&mut file, &mut buffer).map_err(Error::io("read", path))? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
