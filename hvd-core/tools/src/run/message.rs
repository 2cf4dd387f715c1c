//! What `hvdrun` and its agents say to each other, over the agents' stdin and stdout.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The first line of an agent. What a login shell prints before it is skipped.
pub const GREETING: &str = concat!("hvdrun agent ", env!("CARGO_PKG_VERSION"), " protocol 1\n");

/// The longest message, in bytes: an environment with room to spare.
const MAX_BYTES: usize = 64 << 20;

/// Bytes of output or input that travel at a time.
pub const CHUNK_BYTES: usize = 32 << 10;

/// From `hvdrun` to an agent. That its input ends means that `hvdrun` is gone: the agent ends its ranks.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// Find an address where rank 0 can be met.
    Reserve(Reserve),
    /// Start these ranks.
    Launch(Box<Order>),
    /// Send a signal to all ranks.
    Signal(i32),
    /// Bytes for rank 0's stdin; none: it has ended.
    Stdin(Vec<u8>),
}

/// How to find an address where rank 0 can be met.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reserve {
    /// The interface to use, if the user named one.
    pub interface: Option<String>,
    /// Another host of the job: the way there decides where nothing else does.
    pub toward: String,
}

/// What an agent starts.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// Program and arguments, each as the bytes that the system uses.
    pub command: Vec<Vec<u8>>,
    /// Where it runs.
    pub folder: PathBuf,
    /// Variables of all ranks of this host, on top of the agent's environment.
    pub variables: Vec<Variable>,
    /// Variables that the ranks must not inherit.
    pub removed: Vec<String>,
    /// The ranks of this host, each with its own variables.
    pub ranks: Vec<(usize, Vec<Variable>)>,
    /// Where rank 0 is met, if the job has several hosts.
    pub rendezvous: Option<SocketAddr>,
    /// The interface whose address the ranks listen on, if the user named one.
    pub interface: Option<String>,
    /// Between asking the ranks to end and killing them, in milliseconds.
    pub grace_ms: u64,
}

/// An environment variable: name and value, as the bytes that the system uses.
pub type Variable = (Vec<u8>, Vec<u8>);

/// From an agent to `hvdrun`.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// Rank 0 can be met here; the agent holds the port until the end of the job.
    Reserved(SocketAddr),
    /// A rank's process.
    Started {
        /// The rank.
        rank: usize,
        /// Its process id on the agent's host.
        pid: u32,
    },
    /// A rank has printed something.
    Output {
        /// The rank.
        rank: usize,
        /// Where to.
        stream: Stream,
        /// The bytes, which may end within a line.
        bytes: Vec<u8>,
    },
    /// Rank 0 has read what it was given last.
    StdinTaken,
    /// A rank has ended, and all its output was sent before.
    Ended {
        /// The rank.
        rank: usize,
        /// How.
        end: End,
    },
    /// The agent cannot do what it was told; nothing of it is left running.
    Failed {
        /// What to end `hvdrun` with.
        code: u8,
        /// Why.
        text: String,
    },
}

/// One of a rank's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// `stdout` or `stderr`.
    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// With an exit code.
    Code(i32),
    /// Killed by a signal.
    Signal(i32),
}

/// Writes a message, preceded by its length.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(body);
    to.write_all(&bytes)?;
    to.flush()
}

/// Reads a message; `None` where the other side has gone.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_BYTES {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("a message of {length} bytes")));
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    postcard::from_bytes(&body).map(Some).map_err(|error| io::Error::new(ErrorKind::InvalidData, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let mut wire = Vec::new();
        let output = |bytes: &[u8]| FromAgent::Output { rank: 3, stream: Stream::Stderr, bytes: bytes.to_vec() };
        for message in [output(b"a\xff\n"), FromAgent::Ended { rank: 3, end: End::Signal(9) }] {
            send(&mut wire, &message).unwrap();
        }
        let mut from = wire.as_slice();
        let first = receive::<FromAgent>(&mut from).unwrap().unwrap();
        assert!(matches!(first, FromAgent::Output { rank: 3, stream: Stream::Stderr, bytes } if bytes == b"a\xff\n"));
        let second = receive::<FromAgent>(&mut from).unwrap().unwrap();
        assert!(matches!(second, FromAgent::Ended { rank: 3, end: End::Signal(9) }));
        assert!(receive::<FromAgent>(&mut from).unwrap().is_none());
    }

    #[test]
    fn a_length_that_cannot_be_is_refused_before_memory_is_taken() {
        let error = receive::<ToAgent>(&mut [0xff; 8].as_slice()).unwrap_err();
        assert!(error.to_string().contains("4294967295 bytes"), "{error}");
    }
}
