//! The state of a checkpoint as a file, and the checksums that tell a whole checkpoint from a damaged one.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

pub use lm_formats::state::{CheckpointState, FORMAT_VERSION, GuardState, ScalerState};

const NAME: &str = "state.json";

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
    CheckpointState::from_json(&text).map_err(|malformed| refuse(malformed.to_string()))
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
    state.check_files().map_err(|malformed| refuse(malformed.to_string()))?;
    for (name, expected) in &state.files {
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
