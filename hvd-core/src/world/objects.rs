//! Values of any serde type, exchanged between ranks.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ProcessSet;
use crate::error::{Error, Result};

impl ProcessSet {
    /// Gives all ranks the root's `value`. The others' is ignored and may be `None`.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the root has no value or the types do not fit, else as [`crate::engine::Handle::wait`].
    pub fn broadcast_object<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        value: Option<T>,
        root: usize,
    ) -> Result<T> {
        // The length first, as the others do not know it. An unserialisable value must not leave them waiting.
        let encoded = match (&value, self.rank() == root) {
            (Some(value), true) => encode(name, value),
            (None, true) => Err(Error::Invalid(format!("`{name}`: the root has no value to broadcast"))),
            (_, false) => Ok(Vec::new()),
        };
        let mut length = [encoded.as_ref().map_or(-1, |bytes| bytes.len() as i64)];
        self.broadcast(&format!("{name}.length"), &mut length, root)?;
        let length = usize::try_from(length[0]);
        let mut bytes = encoded?;
        let length = length.map_err(|_| Error::Invalid(format!("`{name}`: the root could not send its value")))?;
        bytes.resize(length, 0);
        self.broadcast(&format!("{name}.bytes"), &mut bytes, root)?;
        decode(name, &bytes)
    }

    /// Gives all ranks everyone's `value`, by rank.
    ///
    /// # Errors
    /// [`Error::Invalid`] where a value cannot be encoded or the types do not fit, else as
    /// [`crate::engine::Handle::wait`].
    pub fn allgather_object<T: Serialize + DeserializeOwned>(&self, name: &str, value: &T) -> Result<Vec<T>> {
        let encoded = encode(name, value);
        let bytes = encoded.as_ref().cloned().unwrap_or_default();
        let (all, lengths) = self.allgather_async(name, bytes)?.wait_with_rows()?;
        encoded?;
        let mut rest = all.as_slice();
        let mut values = Vec::with_capacity(self.size());
        for length in lengths {
            let (own, others) = rest.split_at(length.min(rest.len()));
            values.push(decode(name, own)?);
            rest = others;
        }
        Ok(values)
    }
}

fn encode<T: Serialize>(name: &str, value: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|error| Error::Invalid(format!("`{name}` cannot be encoded: {error}")))
}

/// Reads a value that a peer has encoded.
///
/// # Errors
/// [`Error::Invalid`] for bytes that are no such value.
pub fn decode<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).map_err(|error| {
        let hint = "do all ranks use the same type and the same build?";
        Error::Invalid(format!("`{name}` cannot be decoded: {error}; {hint}"))
    })
}
