//! Finding checkpoints: the newest whole one, and those that are old enough to go.

use std::path::{Path, PathBuf};

use super::files::discard;
use super::state::{CheckpointState, read_state, verify};
use crate::{Error, Result};

/// Where [`set_aside_later`] puts checkpoints.
const SUPERSEDED: &str = "superseded";

/// What [`find_newest`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The whole checkpoint with the most updates.
    pub newest: Option<(PathBuf, CheckpointState)>,
    /// Newer ones that are not whole, each with the reason.
    pub skipped: Vec<String>,
}

/// The newest whole checkpoint in `folder`; none where there is no such folder.
///
/// # Errors
/// [`Error::Io`] where the folder cannot be listed.
pub fn find_newest(folder: &Path) -> Result<Found> {
    let mut found = Found::default();
    let mut candidates = Vec::new();
    for path in checkpoints(folder)? {
        match read_state(&path) {
            Ok(state) => candidates.push((state.global_step, path)),
            Err(error) => found.skipped.push(error.to_string()),
        }
    }
    candidates.sort();
    while let Some((_, path)) = candidates.pop() {
        match verify(&path) {
            Ok(state) => {
                found.newest = Some((path, state));
                break;
            }
            Err(error) => found.skipped.push(error.to_string()),
        }
    }
    Ok(found)
}

/// The folders of checkpoints in `folder`, sorted by name.
fn checkpoints(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", folder)(error)),
    };
    let is_ours = |name: &str| name.starts_with("checkpoint_epoch") || name == "best_model" || name == "final_model";
    let ours = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_ours));
    let mut paths: Vec<PathBuf> = ours.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    paths.sort();
    Ok(paths)
}

/// Removes all but the `keep` newest `checkpoint_epoch{E}_step{S}`; 0 keeps all.
///
/// # Errors
/// [`Error::Io`].
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let step = |path: &PathBuf| path.file_name()?.to_str()?.split_once("_step")?.1.parse::<u64>().ok();
    let mut steps: Vec<(u64, PathBuf)> =
        checkpoints(folder)?.into_iter().filter_map(|path| Some((step(&path)?, path))).collect();
    steps.sort();
    let surplus = if keep == 0 { 0 } else { steps.len().saturating_sub(keep) };
    steps[..surplus].iter().try_for_each(|(_, path)| discard(path))
}

/// Moves the checkpoints with more than `global_step` updates, and those that cannot be read, into the folder `superseded` within
/// `folder`: training goes on before them, so they are of another future. Gives their new places.
///
/// # Errors
/// [`Error::Io`].
pub fn set_aside_later(folder: &Path, global_step: u64) -> Result<Vec<PathBuf>> {
    let is_later = |path: &PathBuf| read_state(path).map_or(true, |state| state.global_step > global_step);
    let mut moved = Vec::new();
    for path in checkpoints(folder)?.into_iter().filter(is_later) {
        let aside = folder.join(SUPERSEDED);
        std::fs::create_dir_all(&aside).map_err(Error::io("create", &aside))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let numbered = (2..).map(|n| aside.join(format!("{name}-{n}")));
        let target = std::iter::once(aside.join(&*name)).chain(numbered).find(|target| !target.exists());
        let target = target.unwrap_or_else(|| aside.join(&*name));
        std::fs::rename(&path, &target).map_err(Error::io("rename", &path))?;
        moved.push(target);
    }
    Ok(moved)
}

/// The checkpoint that [`resolve`] finds, with every file as `state.json` says. Where it has no optimizer's state it was stripped for
/// generation: its list of files does not hold then, and is not looked at.
///
/// # Errors
/// [`Error::Checkpoint`] where there is none, or where a file is missing or damaged.
pub fn resolve_whole(path: &Path) -> Result<PathBuf> {
    let folder = resolve(path)?;
    if folder.join("optimizer.safetensors").exists() {
        verify(&folder)?;
    }
    Ok(folder)
}

/// The checkpoint that a person means by `path`: itself, or in a run's folder its `best_model`, else its newest
/// whole one, or in a folder of runs that of the newest run.
///
/// # Errors
/// [`Error::Checkpoint`] where there is none.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Err(Error::checkpoint(path, "there is no such folder"));
    }
    if path.join("state.json").exists() {
        return Ok(path.to_path_buf());
    }
    if path.join("best_model/state.json").is_file() {
        return Ok(path.join("best_model"));
    }
    if let Some((newest, _)) = find_newest(path)?.newest {
        return Ok(newest);
    }
    let mut runs: Vec<PathBuf> =
        std::fs::read_dir(path).map_err(Error::io("list", path))?.flatten().map(|e| e.path()).collect();
    runs.retain(|run| run.join("run_metadata.json").is_file());
    runs.sort();
    runs.iter().rev().find_map(|run| resolve(run).ok()).ok_or_else(|| {
        Error::checkpoint(path, "neither a checkpoint nor a run with one; expected a folder with state.json")
    })
}
