//! What `transformer-lm` keeps on disk, as bytes: readers and writers that touch neither files nor tensors.
//!
//! Apart, because whatever reads bytes from outside is fuzzed, and neither libtorch nor a tokenizer is needed for that.
#![deny(missing_docs)]

pub mod shard;
pub mod state;

/// Bytes that are not what they should be; the text says why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl From<&str> for Malformed {
    fn from(reason: &str) -> Self {
        Malformed(reason.into())
    }
}

impl From<String> for Malformed {
    fn from(reason: String) -> Self {
        Malformed(reason)
    }
}
