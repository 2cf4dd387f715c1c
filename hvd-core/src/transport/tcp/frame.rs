//! What goes over a connection of the mesh: a header of fixed size, then the payload.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic |
//! | 4..8 | kind |
//! | 8..16 | generation of the world |
//! | 16..20 | channel (of an abort: the rank that failed first) |
//! | 20..24 | sequence (of an abort: 1 where that rank is well and has ended the world for what it has seen) |
//! | 24..32 | length of the payload |
//!
//! All numbers are little-endian.

use crate::transport::Tag;

/// Length of a header, in bytes.
pub(super) const HEADER_BYTES: usize = 32;

/// The longest cause of an abort, in bytes; a longer one is cut.
pub(super) const MAX_CAUSE_BYTES: usize = 4096;

const MAGIC: u32 = u32::from_le_bytes(*b"HVD1");

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A message with a tag.
    Data,
    /// Wakes the receiver. No payload.
    Ring,
    /// The sender gives up; the payload says why.
    Abort,
    /// The sender's last frame. No payload.
    Goodbye,
}

/// The fields of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) generation: u64,
    pub(super) tag: Tag,
    pub(super) length: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let kind = match self.kind {
            Kind::Data => 1u32,
            Kind::Ring => 2,
            Kind::Abort => 3,
            Kind::Goodbye => 4,
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.tag.channel.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.tag.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Reads a header; the error says what is wrong with the bytes.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, String> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(format!("a frame begins with {magic:#010x} instead of {MAGIC:#010x}"));
        }
        let kind = match u32_at(bytes, 4) {
            1 => Kind::Data,
            2 => Kind::Ring,
            3 => Kind::Abort,
            4 => Kind::Goodbye,
            other => return Err(format!("frames of kind {other} do not exist")),
        };
        let header = Header {
            kind,
            generation: u64_at(bytes, 8),
            tag: Tag { channel: u32_at(bytes, 16), sequence: u32_at(bytes, 20) },
            length: u64_at(bytes, 24),
        };
        match (kind, header.length) {
            (Kind::Ring | Kind::Goodbye, 1..) => Err(format!("{kind:?} with {} bytes", header.length)),
            (Kind::Abort, length) if length > MAX_CAUSE_BYTES as u64 => Err(format!("a cause of {length} bytes")),
            _ => Ok(header),
        }
    }
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: Kind, length: u64) -> Header {
        Header { kind, generation: 3, tag: Tag { channel: 1 << 31, sequence: 9 }, length }
    }

    #[test]
    fn a_header_comes_back() {
        for header in [header(Kind::Data, 5 << 32), header(Kind::Ring, 0), header(Kind::Abort, 7)] {
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Header::decode(&[0; HEADER_BYTES]).is_err());
        assert!(Header::decode(&[0xff; HEADER_BYTES]).is_err());
        assert!(Header::decode(&header(Kind::Goodbye, 1).encode()).is_err());
        assert!(Header::decode(&header(Kind::Abort, u64::MAX).encode()).is_err());
        let mut bytes = header(Kind::Data, 0).encode();
        bytes[4] = 9;
        assert!(Header::decode(&bytes).is_err());
    }
}
