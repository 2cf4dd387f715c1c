//! How the ranks of a world find each other: they meet at rank 0, which hands out a list of addresses and a key, and
//! then each pair connects.
//!
//! 1. Every rank opens a listener of its own for the mesh.
//! 2. Rank 0 serves the meeting point; the others connect to it (in any order; they retry until it is there), prove who
//!    they are, and say rank, size and listener ([`note::Note::Hello`]).
//! 3. When all are there, rank 0 sends them the roster. Each rank connects to all lower ones and is called by all
//!    higher ones, neighbours a second time for their heartbeats; both ends of each connection prove that they know the key ([`proof`]).
//! 4. Each rank tells rank 0 that its connections stand, and rank 0 tells all to go.
//!
//! The connections to rank 0 stay open until then: a rank that fails or dies on the way ends the start of all at once,
//! with the cause. Connections of strangers are dropped; they cost a thread for a few seconds.

mod doorman;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod guest;
mod host;
mod lifeline;
mod mesh;
mod note;
mod proof;
mod stream;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::time::Instant;

use lifeline::Lifeline;
pub(super) use mesh::Connections;
use proof::Key;

use super::TcpOptions;
use crate::error::{Error, Result};

/// The version of the protocol; ranks of different versions refuse each other.
const PROTOCOL_VERSION: u32 = 2;

/// Who a process is in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// This rank, `0 .. size`.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Tells the worlds that a job makes one after the other apart.
    pub generation: u64,
}

/// Where the ranks meet, and what keeps strangers out.
#[derive(Clone, Debug)]
pub enum Meeting {
    /// A Unix socket without a file; the kernel vouches that both ends run as the same user. One host only.
    Unix {
        /// Tells the jobs of a user apart. The same on all ranks.
        job: String,
    },
    /// An address that rank 0 can listen on and the others reach.
    Tcp {
        /// Host and port.
        address: String,
        /// What only the ranks of this job know.
        secret: Secret,
    },
}

/// A secret that all ranks of a job share. Not shown by `Debug`.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// The shortest secret that is accepted, in bytes.
    pub const MIN_BYTES: usize = 16;

    /// Takes a secret that the user gave.
    ///
    /// # Errors
    /// If it is shorter than [`Secret::MIN_BYTES`].
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self> {
        let bytes = bytes.into();
        if bytes.len() >= Self::MIN_BYTES {
            return Ok(Secret(bytes));
        }
        Err(Error::Config(format!(
            "the job's secret has {} bytes and could be guessed; give at least {}, for instance by `openssl rand -hex 32`",
            bytes.len(),
            Self::MIN_BYTES
        )))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Connects this rank with all others.
pub(super) fn gather(identity: Identity, meeting: &Meeting, options: &TcpOptions) -> Result<Connections> {
    check_bind(meeting, options)?;
    let deadline = Instant::now() + options.start_timeout;
    let listener = listen(options.bind)?;
    let address = local_address(&listener)?;
    let (roster, mut lifeline) = match identity.rank {
        0 => host::host(identity, meeting, address, deadline)?,
        _ => guest::join(identity, meeting, address, deadline)?,
    };
    let built = mesh::build(identity, listener, &roster, &mut lifeline, deadline);
    built.inspect_err(|error| lifeline.tell_failure(identity.rank, error))
}

/// Connects this rank with all others, where the addresses are exchanged by other means: `exchange` is given this
/// rank's address and 32 random bytes, and gives back the addresses of all ranks and the random bytes of rank 0.
pub(super) fn gather_through(
    identity: Identity,
    options: &TcpOptions,
    exchange: impl FnOnce(SocketAddr, [u8; 32]) -> Result<(Vec<SocketAddr>, [u8; 32])>,
) -> Result<Connections> {
    let deadline = Instant::now() + options.start_timeout;
    let listener = listen(options.bind)?;
    let (addresses, seed) = exchange(local_address(&listener)?, random_bytes()?)?;
    let roster = Roster { addresses, key: Key::new(&seed) };
    mesh::build(identity, listener, &roster, &mut Lifeline::None, deadline)
}

/// The addresses of all ranks, and the key that they prove to each other.
struct Roster {
    addresses: Vec<SocketAddr>,
    key: Key,
}

fn check_bind(meeting: &Meeting, options: &TcpOptions) -> Result<()> {
    match (meeting, options.bind) {
        (Meeting::Unix { .. }, Some(ip)) if !ip.is_loopback() => Err(Error::Config(format!(
            "this rank shall listen on {ip}, beyond this host, but the ranks meet at a Unix socket; give all ranks an \
             address to meet at and a secret (HVD_RENDEZVOUS=host:port HVD_SECRET=…)"
        ))),
        _ => Ok(()),
    }
}

/// The address that packets to `host:port` carry as their source. Sends nothing.
///
/// # Errors
/// If the name cannot be resolved or no way leads there.
pub fn source_address(toward: &str) -> std::io::Result<IpAddr> {
    let mut result = Err(std::io::Error::other("the name has no address"));
    for address in toward.to_socket_addrs()? {
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        // A datagram socket that is connected has an address and has said nothing.
        let source =
            UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(address).and_then(|()| socket.local_addr()));
        match source {
            Ok(source) => return Ok(source.ip()),
            Err(error) => result = Err(error),
        }
    }
    result
}

fn listen(bind: Option<IpAddr>) -> Result<TcpListener> {
    let ip = bind.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    TcpListener::bind((ip, 0)).map_err(|error| Error::io(format!("listening on {ip}"), error))
}

fn local_address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().map_err(|error| Error::io("reading a listener's address", error))
}

fn random_bytes() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::io("asking the system for random bytes", std::io::Error::other(error.to_string())))?;
    Ok(bytes)
}

fn rendezvous(text: impl Into<String>) -> Error {
    Error::Rendezvous(text.into())
}
