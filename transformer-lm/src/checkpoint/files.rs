//! Writing so that a kill at any moment leaves the old or the new, nothing between.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::{Error, Result};

/// Names that begin so are unfinished work of this crate.
const TEMPORARY: &str = ".tmp-";
/// An older folder that is being replaced, on file systems that cannot exchange two names.
const REPLACED: &str = ".old-";

/// Replaces `path` by a file with these bytes in one step.
///
/// # Errors
/// [`Error::Io`]; `path` is then as it was.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!("{TEMPORARY}{name}-{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        Error::io("write", path)(error)
    })?;
    sync(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Brings every file of a folder, and the folder, to the disk.
pub(crate) fn sync_all(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))?.flatten() {
        sync(&entry.path())?;
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io("sync", path))
}

/// Gives the finished folder `temporary` its name; one that has the name goes.
pub(crate) fn publish(temporary: &Path, target: &Path) -> Result<()> {
    let parent = target.parent().unwrap_or(Path::new("."));
    if !target.exists() {
        std::fs::rename(temporary, target).map_err(Error::io("rename", temporary))?;
        return sync(parent);
    }
    if !target.is_dir() {
        return Err(Error::checkpoint(target, "a file of that name is in the way"));
    }
    match renameat_with(CWD, temporary, CWD, target, RenameFlags::EXCHANGE) {
        Ok(()) => {}
        Err(Errno::INVAL | Errno::NOSYS) => replace_in_two_steps(temporary, target)?,
        Err(error) => return Err(Error::io("replace", target)(error.into())),
    }
    sync(parent)?;
    std::fs::remove_dir_all(temporary).map_err(Error::io("remove", temporary))
}

/// For file systems without exchange. A kill between the two renames is mended by [`clean_leftovers`].
fn replace_in_two_steps(temporary: &Path, target: &Path) -> Result<()> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let old = target.with_file_name(format!("{REPLACED}{name}"));
    std::fs::rename(target, &old).map_err(Error::io("rename", target))?;
    std::fs::rename(temporary, target).map_err(Error::io("rename", temporary))?;
    std::fs::rename(&old, temporary).map_err(Error::io("rename", &old))
}

/// Removes a folder so that it is never seen half under its name.
pub(super) fn discard(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!("{TEMPORARY}gone-{name}-{}", std::process::id()));
    std::fs::rename(path, &temporary).map_err(Error::io("rename", path))?;
    std::fs::remove_dir_all(&temporary).map_err(Error::io("remove", &temporary))
}

/// Removes what a killed run left unfinished in `folder`; a folder that does not exist is clean.
///
/// # Errors
/// [`Error::Io`].
pub fn clean_leftovers(folder: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if let Some(kept) = name.strip_prefix(REPLACED).map(|name| folder.join(name)) {
            match kept.exists() {
                true => std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?,
                false => std::fs::rename(&path, &kept).map_err(Error::io("rename", &path))?,
            }
        } else if name.starts_with(TEMPORARY) {
            let remove = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            remove.map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}
