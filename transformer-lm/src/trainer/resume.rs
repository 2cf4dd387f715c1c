//! Where a run starts: a new folder, or the checkpoint to go on from.

use std::path::{Path, PathBuf};

use crate::checkpoint::{self, CheckpointState};
use crate::config::PathsSection;
use crate::metrics::{RunFolder, RunLock};
use crate::{Error, Result};

/// `--resume`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The newest whole checkpoint of the newest run of this name that has one; a new run where there is none.
    Auto,
    /// This checkpoint, or the newest whole one of this run's folder.
    Path(PathBuf),
}

impl From<&str> for Resume {
    fn from(text: &str) -> Self {
        if text == "auto" { Resume::Auto } else { Resume::Path(text.into()) }
    }
}

/// What [`find`] decided.
#[derive(Debug)]
pub struct Start {
    /// The folder of the run that goes on, with its lock; none: a new run.
    pub run: Option<(RunFolder, RunLock)>,
    /// The checkpoint to load.
    pub checkpoint: Option<PathBuf>,
    /// What was found and passed over, for people.
    pub notes: Vec<String>,
}

/// Decides where to start; makes no folder. Called by rank 0 alone.
///
/// # Errors
/// [`Error::Checkpoint`] for a path without a whole checkpoint; [`Error::Training`] for a run that another training goes on
/// with; [`Error::Io`].
pub fn find(paths: &PathsSection, resume: Option<&Resume>, run_name: &str) -> Result<Start> {
    match resume {
        None => Ok(Start { run: None, checkpoint: None, notes: Vec::new() }),
        Some(Resume::Auto) => auto(paths, run_name),
        Some(Resume::Path(path)) => from_path(paths, path),
    }
}

fn auto(paths: &PathsSection, run_name: &str) -> Result<Start> {
    let mut notes = Vec::new();
    let mut newest = None;
    for run in RunFolder::all(paths, run_name) {
        let lock = RunLock::take(&run.root)?; // first: what another training is writing is no leftover
        checkpoint::clean_leftovers(&run.root)?;
        let found = checkpoint::find_newest(&run.root)?;
        notes.extend(found.skipped.iter().map(|reason| format!("resume: skipped {reason}")));
        if let Some((path, _)) = found.newest {
            notes.push(format!("resume: going on from {}", path.display()));
            return Ok(Start { run: Some((run, lock)), checkpoint: Some(path), notes });
        }
        notes.push(format!("resume: {} has no whole checkpoint", run.root.display()));
        newest = newest.or(Some((run, lock)));
    }
    notes.push(match &newest {
        Some((run, _)) => format!("resume: starting {} from the beginning", run.root.display()),
        None => {
            let folder = paths.checkpoint_dir.display();
            format!("resume: there is no run named {run_name} in {folder} yet; starting one")
        }
    });
    Ok(Start { run: newest, checkpoint: None, notes })
}

fn from_path(paths: &PathsSection, path: &Path) -> Result<Start> {
    if !path.is_dir() {
        return Err(Error::checkpoint(
            path,
            "there is no such folder\nhint: --resume takes a checkpoint's folder or auto",
        ));
    }
    let path = path.canonicalize().map_err(Error::io("resolve", path))?;
    let mut notes = Vec::new();
    let checkpoint = if path.join("state.json").exists() { path.clone() } else { newest_in(&path, &mut notes)? };
    let run = RunFolder::of_checkpoint(paths, &checkpoint);
    let run = run.map(|run| RunLock::take(&run.root).map(|lock| (run, lock))).transpose()?;
    notes.push(format!("resume: going on from {}", checkpoint.display()));
    Ok(Start { run, checkpoint: Some(checkpoint), notes })
}

/// The newest whole checkpoint of a run's folder.
fn newest_in(folder: &Path, notes: &mut Vec<String>) -> Result<PathBuf> {
    let found = checkpoint::find_newest(folder)?;
    notes.extend(found.skipped.iter().map(|reason| format!("resume: skipped {reason}")));
    match found.newest {
        Some((path, _)) => Ok(path),
        None if found.skipped.is_empty() => Err(Error::checkpoint(folder, "no checkpoint here: state.json is missing")),
        None => Err(Error::checkpoint(folder, format!("no whole checkpoint here\n{}", found.skipped.join("\n")))),
    }
}

/// Refuses to go on from the checkpoint at `path` where its position makes no sense or would mean other data.
///
/// # Errors
/// [`Error::Checkpoint`]; [`Error::Config`] that names what differs.
pub fn check(path: &Path, saved: &CheckpointState, fresh: &CheckpointState) -> Result<()> {
    if saved.global_batch_size == 0 {
        return Err(Error::Config(
            "cannot resume: the checkpoint holds weights and no place in a training (it was imported, or saved without one)\n\
             hint: start a new run from it with --set training.init_from=CHECKPOINT"
                .into(),
        ));
    }
    saved.check_position().map_err(|malformed| Error::checkpoint(path, malformed.to_string()))?;
    let (seed, batch) = (saved.seed, saved.global_batch_size);
    let data = "take the data and model.max_seq_len of the run's config_used.yaml".to_string();
    let compared = [
        ("seed", seed, fresh.seed, format!("set seed to {seed} again")),
        (
            "sequences per update",
            batch as u64,
            fresh.global_batch_size as u64,
            format!("set training.global_batch_size to {batch}"),
        ),
        ("updates per epoch (the data or max_seq_len)", saved.batches_per_epoch, fresh.batches_per_epoch, data),
    ];
    match compared.iter().find(|(_, saved, now, _)| saved != now) {
        None => Ok(()),
        Some((what, saved, now, hint)) => Err(Error::Config(format!(
            "cannot resume at the very step: {what} was {saved} in the checkpoint and is {now} now\n\
             hint: {hint}, or start a new run without --resume"
        ))),
    }
}
