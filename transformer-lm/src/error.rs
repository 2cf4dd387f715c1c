//! One error type for the crate. A text says what is wrong, then on a line of its own what to do about it.

use std::path::{Path, PathBuf};

/// What can go wrong while preparing, training or generating.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration, a flag or an argument makes no sense. The process exits with code 2.
    #[error("{0}")]
    Config(String),

    /// A data folder, a tokenizer file or a shard is missing, damaged or does not fit the model.
    #[error("{}: {detail}", path.display())]
    Data {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        detail: String,
    },

    /// A checkpoint is missing, not whole, or of another model.
    #[error("checkpoint {}: {detail}", path.display())]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        detail: String,
    },

    /// The operating system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "read", "create".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },

    /// libtorch refused something.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),

    /// The ranks could not work together, or an operation on tensors failed.
    #[error("{0}")]
    Hvd(#[from] hvd_torch::Error),

    /// Training cannot go on: the loss is not finite, a peer is lost, the device is missing.
    #[error("{0}")]
    Training(String),
}

impl Error {
    /// Wraps the system's answer with what was tried on which path; for `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// A fault of a data file or folder.
    pub fn data(path: impl AsRef<Path>, detail: impl Into<String>) -> Error {
        Error::Data { path: path.as_ref().to_path_buf(), detail: detail.into() }
    }

    /// A fault of a checkpoint.
    pub fn checkpoint(path: impl AsRef<Path>, detail: impl Into<String>) -> Error {
        Error::Checkpoint { path: path.as_ref().to_path_buf(), detail: detail.into() }
    }

    /// Whether it only reports that another rank has failed.
    pub fn is_lost_peer(&self) -> bool {
        use hvd_core::Error::{PeerGaveUp, PeerLost};
        matches!(self, Error::Hvd(hvd_torch::Error::Core(PeerLost { .. } | PeerGaveUp { .. })))
    }

    /// The process's exit code: 2 where the user's settings are at fault, 1 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Config(_) => 2,
            _ => 1,
        }
    }
}

/// A result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
