//! What a sender says over the mesh about each message: its tag and length, and either the bytes themselves or the
//! number under which MPI brings them.

use crate::transport::Tag;

/// Messages up to this length go with their notice, in bytes: what MPI would save is less than what a second message
/// costs.
pub(super) const INLINE_BYTES: usize = 1024;

const HEADER_BYTES: usize = 21;

/// A message that was announced.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) tag: Tag,
    pub(super) length: u64,
    pub(super) body: Body,
}

/// Where the bytes of a message are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// In the notice.
    Here(Vec<u8>),
    /// In MPI, under this tag of its own.
    Mpi(i32),
}

impl Notice {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + INLINE_BYTES);
        bytes.extend(self.tag.channel.to_le_bytes());
        bytes.extend(self.tag.sequence.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
        match &self.body {
            Body::Here(body) => {
                bytes.push(0);
                bytes.extend([0; 4]);
                bytes.extend(body);
            }
            Body::Mpi(number) => {
                bytes.push(1);
                bytes.extend(number.to_le_bytes());
            }
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Notice, String> {
        let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(format!("a notice of {} bytes", bytes.len()));
        };
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let tag = Tag { channel: word(0), sequence: word(4) };
        let length = u64::from(word(8)) | u64::from(word(12)) << 32;
        let number = word(17) as i32;
        let body = match header[16] {
            0 if body.len() as u64 == length => Body::Here(body.to_vec()),
            1 if body.is_empty() && number >= 0 && usize::try_from(length).is_ok() => Body::Mpi(number),
            kind => return Err(format!("a notice of kind {kind}, length {length} and {} bytes", body.len())),
        };
        Ok(Notice { tag, length, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_come_back_and_nonsense_does_not() {
        let tag = Tag { channel: 0xffff_0003, sequence: 7 };
        for (length, body) in [(3, Body::Here(vec![1, 2, 3])), (0, Body::Here(vec![])), (5 << 32, Body::Mpi(77))] {
            let notice = Notice { tag, length, body };
            let mut bytes = notice.encode();
            assert_eq!(Notice::decode(&bytes), Ok(notice));
            bytes.push(0);
            assert!(Notice::decode(&bytes).is_err());
            assert!(Notice::decode(&bytes[..20]).is_err());
        }
        assert!(Notice::decode(&[0xff; 21]).is_err());
    }
}
