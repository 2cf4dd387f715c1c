//! The folder that `prepare` makes: it appears at once and whole, or not at all, and never in place of anything else.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use lm_formats::shard::MAGIC;

use super::{TOKENIZER_FILE, TRAIN, VAL};
use crate::{Error, Result};

/// All tokens before they are split; only while a folder is being made.
pub(super) const UNSPLIT_FILE: &str = "all.tmp";

/// Whether `prepare` makes files of this name.
fn is_ours(name: &str) -> bool {
    let is_shard_of = |part: &str| {
        let Some(rest) = name.strip_prefix(part).and_then(|rest| rest.strip_suffix(".bin")) else { return false };
        rest.is_empty() || rest.bytes().all(|byte| byte.is_ascii_digit() || b"-of".contains(&byte))
    };
    [TRAIN, VAL].into_iter().any(is_shard_of) || name.starts_with(TOKENIZER_FILE) || name == UNSPLIT_FILE
}

/// A claim on a folder's name. What is made lies in a staging folder beside it until [`Output::publish`].
#[derive(Debug)]
pub(super) struct Output {
    target: PathBuf,
    staging: PathBuf,
    replaced: PathBuf,
}

impl Output {
    /// Checks that `target` may be made, and makes the staging folder.
    pub(super) fn claim(target: &Path, overwrite: bool) -> Result<Self> {
        let target = std::path::absolute(target).map_err(Error::io("find", target))?;
        let target = target.canonicalize().unwrap_or(target);
        check_replaceable(&target, overwrite)?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Error::data(&target, "not a name that a folder can be given"));
        };
        let beside = |suffix: &str| parent.join(format!(".{}.{suffix}", name.to_string_lossy()));
        let (staging, replaced) = (beside("partial"), beside("replaced"));
        std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        for leftover in [&staging, &replaced] {
            remove(leftover)?;
        }
        std::fs::create_dir(&staging).map_err(Error::io("create", &staging))?;
        Ok(Self { target, staging, replaced })
    }

    /// Where the files are made.
    pub(super) fn staging(&self) -> &Path {
        &self.staging
    }

    /// Gives the staging folder its name; what had it is removed.
    pub(super) fn publish(self) -> Result<()> {
        sync_folder(&self.staging)?;
        let there = self.target.exists();
        if there {
            std::fs::rename(&self.target, &self.replaced).map_err(Error::io("rename", &self.target))?;
        }
        if let Err(error) = std::fs::rename(&self.staging, &self.target) {
            if there {
                let _ = std::fs::rename(&self.replaced, &self.target);
            }
            return Err(Error::io("create", &self.target)(error));
        }
        remove(&self.replaced)?;
        self.target.parent().map_or(Ok(()), sync_folder)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = remove(&self.staging);
    }
}

fn check_replaceable(target: &Path, overwrite: bool) -> Result<()> {
    if !target.exists() {
        return Ok(());
    }
    if !target.is_dir() {
        return Err(Error::data(target, "a file is in the way; choose another --output"));
    }
    let names = entries(target)?;
    if names.is_empty() {
        return Ok(());
    }
    let has_shard = names.iter().any(|name| name.starts_with(TRAIN) && is_shard(&target.join(name)));
    if !names.iter().all(|name| is_ours(name)) || !has_shard {
        return Err(Error::data(target, "holds something else than prepared data; choose another --output"));
    }
    if !overwrite {
        return Err(Error::data(target, "holds prepared data already; give --overwrite to replace it"));
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let listing = std::fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let name = |entry: std::io::Result<std::fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    listing.map(name).collect::<std::io::Result<_>>().map_err(Error::io("list", folder))
}

fn is_shard(path: &Path) -> bool {
    let mut start = [0; MAGIC.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && &start == MAGIC
}

/// Makes a folder's entries durable.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", folder))
}

/// Removes a folder of ours, file by file: whatever else lies in it stops the removal.
fn remove(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for name in entries(folder)?.iter().filter(|name| is_ours(name)) {
        let path = folder.join(name);
        std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    std::fs::remove_dir(folder).map_err(Error::io("remove", folder))
}
