//! A text file that grows by whole lines.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The open file. A line is there whole or not at all, also when the disk is full.
#[derive(Debug)]
pub(super) struct Lines {
    file: File,
    path: PathBuf,
    /// Bytes of the whole lines.
    len: u64,
}

impl Lines {
    /// Opens `path` with what `keep` leaves of its text; a file that is not there is empty.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Data`] where `keep` refuses the text.
    pub(super) fn open(path: &Path, keep: impl FnOnce(&str) -> std::result::Result<String, String>) -> Result<Lines> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        let kept = keep(&text).map_err(|detail| Error::data(path, detail))?;
        crate::checkpoint::write_atomically(path, kept.as_bytes())?;
        let file = File::options().append(true).open(path).map_err(Error::io("open", path))?;
        Ok(Lines { file, path: path.to_path_buf(), len: kept.len() as u64 })
    }

    /// Appends a line, which ends with a line break; it has reached the operating system when this returns.
    ///
    /// # Errors
    /// [`Error::Io`]; the file is then as it was.
    pub(super) fn append(&mut self, line: &str) -> Result<()> {
        let written = self.file.write_all(line.as_bytes());
        match written {
            Ok(()) => self.len += line.len() as u64,
            // What was written of it would make the next line unreadable.
            Err(_) => drop(self.file.set_len(self.len)),
        }
        written.map_err(Error::io("write", &self.path))
    }
}
