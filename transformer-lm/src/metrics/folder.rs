//! The folder of a run: made, or found again.

use std::path::{Path, PathBuf};

use crate::config::PathsSection;
use crate::{Error, Result};

/// Length of `20260131_093000`.
const STAMP: usize = 15;

/// Where a run keeps what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    /// `<timestamp>_<run name>`; holds the checkpoints.
    pub root: PathBuf,
    /// Holds `metrics.csv`.
    pub logs: PathBuf,
    /// Holds TensorBoard's files.
    pub tensorboard: PathBuf,
}

impl RunFolder {
    /// Makes a new folder for a run that starts now.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that cannot be a folder's; [`Error::Io`].
    pub fn create(paths: &PathsSection, run_name: &str) -> Result<RunFolder> {
        check_name(run_name)?;
        std::fs::create_dir_all(&paths.checkpoint_dir).map_err(Error::io("create", &paths.checkpoint_dir))?;
        let mut time = jiff::Zoned::now();
        loop {
            let root = paths.checkpoint_dir.join(format!("{}_{run_name}", time.strftime("%Y%m%d_%H%M%S")));
            match std::fs::create_dir(&root) {
                Ok(()) => {
                    return RunFolder::at(root.clone(), paths).with_folders().inspect_err(|_| {
                        let _ = std::fs::remove_dir(&root); // empty, or it stays
                    });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    time = time.saturating_add(jiff::Span::new().seconds(1));
                }
                Err(error) => return Err(Error::io("create", &root)(error)),
            }
        }
    }

    /// The runs of that name below `paths.checkpoint_dir`, the newest first.
    pub fn all(paths: &PathsSection, run_name: &str) -> Vec<RunFolder> {
        let entries = std::fs::read_dir(&paths.checkpoint_dir).into_iter().flatten().flatten();
        let names = entries.filter(|entry| entry.path().is_dir()).filter_map(|e| e.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| name_of_run(name) == Some(run_name)).collect();
        names.sort_by(|a, b| b.cmp(a));
        names.into_iter().map(|name| RunFolder::at(paths.checkpoint_dir.join(name), paths)).collect()
    }

    /// The run that a checkpoint belongs to: the folder above it, if that is a run's.
    pub fn of_checkpoint(paths: &PathsSection, checkpoint: &Path) -> Option<RunFolder> {
        let root = checkpoint.parent()?;
        root.join("run_metadata.json").is_file().then(|| RunFolder::at(root.to_path_buf(), paths))
    }

    /// The layout of a run in `root`.
    pub fn at(root: PathBuf, paths: &PathsSection) -> RunFolder {
        let apart = |folder: &PathBuf| Some(folder.join(root.file_name()?));
        RunFolder {
            logs: paths.log_dir.as_ref().and_then(apart).unwrap_or_else(|| root.clone()),
            tensorboard: paths.tensorboard_dir.as_ref().and_then(apart).unwrap_or_else(|| root.join("tensorboard")),
            root,
        }
    }

    /// Makes the folders that are not there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn with_folders(self) -> Result<RunFolder> {
        for folder in [&self.logs, &self.tensorboard] {
            std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        Ok(self)
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 200 || name.contains(['/', '\0', '\n']) {
        let text = format!("run name {name:?}: expected 1 to 200 characters without `/`, for example --run-name demo");
        return Err(Error::Config(text));
    }
    Ok(())
}

/// `demo` of `20260131_093000_demo`; none for a folder that is no run.
fn name_of_run(folder: &str) -> Option<&str> {
    let (stamp, rest) = folder.split_at_checked(STAMP)?;
    let is_stamp = stamp.bytes().enumerate().all(|(i, b)| if i == 8 { b == b'_' } else { b.is_ascii_digit() });
    if is_stamp { rest.strip_prefix('_') } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_run_of_a_name_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let paths = PathsSection { checkpoint_dir: folder.path().into(), ..Default::default() };
        assert_eq!(RunFolder::all(&paths, "demo"), []);
        for name in ["20260101_000000_demo", "20260102_000000_demo", "20260103_000000_my_demo", "zz_demo"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let newest = RunFolder::all(&paths, "demo").remove(0);
        assert_eq!(newest.root, folder.path().join("20260102_000000_demo"));
        let (first, second) = (RunFolder::create(&paths, "demo").unwrap(), RunFolder::create(&paths, "demo").unwrap());
        assert_ne!(first.root, second.root);
        assert_eq!(RunFolder::all(&paths, "demo")[0], second);
    }

    #[test]
    fn folders_that_lie_apart_have_one_for_each_run() {
        let paths = PathsSection { log_dir: Some("/logs".into()), ..Default::default() };
        let run = RunFolder::at("runs/20260101_000000_demo".into(), &paths);
        assert_eq!(run.logs, Path::new("/logs/20260101_000000_demo"));
        assert_eq!(run.tensorboard, run.root.join("tensorboard"));
    }

    #[test]
    fn names_that_are_no_folder_are_refused() {
        for name in ["", "a/b", "a\nb"] {
            assert!(RunFolder::create(&PathsSection::default(), name).is_err());
        }
    }
}
