//! The folder of a run: made, or found again.

use std::path::{Path, PathBuf};

use crate::config::PathsSection;
use crate::{Error, Result};

/// Length of `20260131_093000`.
const STAMP: usize = 15;

/// Where a run keeps what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    /// `<timestamp>_<run name>`.
    pub root: PathBuf,
    /// Holds the checkpoints.
    pub checkpoints: PathBuf,
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
        std::fs::create_dir_all(&paths.output_dir).map_err(Error::io("create", &paths.output_dir))?;
        let mut time = jiff::Zoned::now();
        loop {
            let root = paths.output_dir.join(format!("{}_{run_name}", time.strftime("%Y%m%d_%H%M%S")));
            match std::fs::create_dir(&root) {
                Ok(()) => return RunFolder::at(root, paths).with_folders(),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    time = time.saturating_add(jiff::Span::new().seconds(1));
                }
                Err(error) => return Err(Error::io("create", &root)(error)),
            }
        }
    }

    /// The newest run of that name below `paths.output_dir`, if there is one.
    pub fn newest(paths: &PathsSection, run_name: &str) -> Option<RunFolder> {
        let entries = std::fs::read_dir(&paths.output_dir).ok()?;
        let names =
            entries.flatten().filter(|entry| entry.path().is_dir()).filter_map(|e| e.file_name().into_string().ok());
        let newest = names.filter(|name| name_of_run(name) == Some(run_name)).max()?;
        Some(RunFolder::at(paths.output_dir.join(newest), paths))
    }

    /// The run that a checkpoint belongs to: the nearest folder above it with a `run_metadata.json`, or, where checkpoints
    /// are kept apart, the one in `paths.output_dir` that the checkpoint's folder is named after.
    pub fn of_checkpoint(paths: &PathsSection, checkpoint: &Path) -> Option<RunFolder> {
        let is_run = |folder: &&Path| folder.join("run_metadata.json").is_file();
        if let Some(root) = checkpoint.ancestors().find(is_run) {
            return Some(RunFolder::at(root.to_path_buf(), paths));
        }
        let root = paths.output_dir.join(checkpoint.parent()?.file_name()?);
        is_run(&root.as_path()).then(|| RunFolder::at(root, paths))
    }

    /// The layout of a run in `root`.
    pub fn at(root: PathBuf, paths: &PathsSection) -> RunFolder {
        let place = |path: &Path| match root.file_name() {
            Some(name) if path.is_absolute() => path.join(name),
            _ if path == Path::new(".") => root.clone(),
            _ => root.join(path),
        };
        let (checkpoints, logs) = (place(&paths.checkpoint_dir), place(&paths.log_dir));
        RunFolder { checkpoints, logs, tensorboard: place(&paths.tensorboard_dir), root }
    }

    /// Makes the folders that are not there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn with_folders(self) -> Result<RunFolder> {
        for folder in [&self.checkpoints, &self.logs, &self.tensorboard] {
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
        let paths = PathsSection { output_dir: folder.path().into(), ..Default::default() };
        assert_eq!(RunFolder::newest(&paths, "demo"), None);
        for name in ["20260101_000000_demo", "20260102_000000_demo", "20260103_000000_my_demo", "zz_demo"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let newest = RunFolder::newest(&paths, "demo").unwrap();
        assert_eq!(newest.root, folder.path().join("20260102_000000_demo"));
        let (first, second) = (RunFolder::create(&paths, "demo").unwrap(), RunFolder::create(&paths, "demo").unwrap());
        assert_ne!(first.root, second.root);
        assert_eq!(RunFolder::newest(&paths, "demo"), Some(second));
    }

    #[test]
    fn absolute_folders_are_kept_apart_by_run() {
        let paths = PathsSection { checkpoint_dir: "/ckpt".into(), ..Default::default() };
        let run = RunFolder::at("runs/20260101_000000_demo".into(), &paths);
        assert_eq!(run.checkpoints, Path::new("/ckpt/20260101_000000_demo"));
        assert_eq!(run.logs, run.root);
    }

    #[test]
    fn names_that_are_no_folder_are_refused() {
        for name in ["", "a/b", "a\nb"] {
            assert!(RunFolder::create(&PathsSection::default(), name).is_err());
        }
    }
}
