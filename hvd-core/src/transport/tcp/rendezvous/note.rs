//! What ranks say to each other over their connections to rank 0.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::stream::Stream;

/// The longest note, in bytes: the addresses of many thousand ranks.
const MAX_NOTE_BYTES: usize = 4 << 20;

/// A note, preceded by its length on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Note {
    /// To rank 0: who I am and where I listen.
    Hello { version: u32, rank: usize, size: usize, generation: u64, listener: SocketAddr },
    /// From rank 0: where all listen, and from what to make the key.
    Roster { addresses: Vec<SocketAddr>, seed: [u8; 32] },
    /// To rank 0: all my connections stand.
    Ready,
    /// From rank 0: all connections of all ranks stand.
    Go,
    /// Either way: the start has failed.
    Failed { text: String },
}

impl Note {
    pub(super) fn send(&self, stream: &mut Stream, deadline: Instant) -> io::Result<()> {
        let body = postcard::to_stdvec(self).map_err(io::Error::other)?;
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend(body);
        stream.write_all_by(&bytes, deadline)
    }

    pub(super) fn receive(stream: &mut Stream, deadline: Instant) -> io::Result<Note> {
        let mut length = [0; 4];
        stream.read_exact_by(&mut length, deadline)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_NOTE_BYTES {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("a note of {length} bytes")));
        }
        let mut body = vec![0; length];
        stream.read_exact_by(&mut body, deadline)?;
        postcard::from_bytes(&body).map_err(|error| io::Error::new(ErrorKind::InvalidData, error.to_string()))
    }
}
