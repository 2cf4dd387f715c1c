//! What can go wrong between tch and the runtime.

use std::fmt;

/// An error of this crate. Each text says what to do next where that is known. Its `Debug` is its text, as that is what users see of a
/// `main` that returns it and of `unwrap`.
#[derive(Clone, thiserror::Error)]
pub enum Error {
    /// The runtime failed: a peer is gone, the ranks disagree, …
    #[error(transparent)]
    Core(#[from] hvd_core::Error),

    /// libtorch refused something; the first lines of its message.
    #[error("torch: {0}")]
    Torch(String),

    /// The caller asked for something that cannot be done.
    #[error("{0}")]
    Invalid(String),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Lines of libtorch's messages that are worth showing. The rest is a C++ backtrace of some 10 kB.
const TORCH_LINES: usize = 3;

impl Error {
    /// An [`Error::Torch`] with the head of libtorch's message.
    pub(crate) fn torch(message: &str) -> Self {
        let useful = message.lines().take_while(|line| !line.starts_with("Exception raised from"));
        let head: Vec<_> = useful.filter(|line| !line.trim().is_empty()).take(TORCH_LINES).collect();
        Error::Torch(head.join(" / "))
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Error::Invalid(message.into())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        match error {
            tch::TchError::Torch(message) => Error::torch(&message),
            other => Error::torch(&other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    #[test]
    fn torchs_messages_are_cut() {
        let zeros = |n: i64| Tensor::zeros([n, n], (Kind::Float, tch::Device::Cpu));
        let error = Error::from(zeros(2).f_matmul(&zeros(3)).unwrap_err()).to_string();
        assert!(error.contains("cannot be multiplied"), "{error}");
        assert!(error.len() < 300, "{error}");
    }
}
