//! The lock that keeps a run's folder to one training at a time.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::{Error, Result};

/// The file that is locked. It stays, so that two who open it have the same one.
const NAME: &str = "run.lock";

/// Held while a training writes into a run's folder. The system gives it back when the process ends, however that happens.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Locks the run in the folder `root`. Where the file system has no locks, nothing is locked.
    ///
    /// # Errors
    /// [`Error::Training`] where another training holds the lock; [`Error::Io`].
    pub fn take(root: &Path) -> Result<RunLock> {
        let path = root.join(NAME);
        let file = File::options().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::Training(format!(
                "another training is writing into the run's folder {}\n\
                 hint: let it come to its end or stop it, or start a new run without --resume, which has a folder of its own",
                root.display()
            ))),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(RunLock { _file: file }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_one_trainings_until_that_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let held = RunLock::take(folder.path()).unwrap();
        let message = RunLock::take(folder.path()).unwrap_err().to_string();
        assert!(message.contains(&*folder.path().to_string_lossy()), "{message}");
        drop(held);
        RunLock::take(folder.path()).unwrap();
    }
}
