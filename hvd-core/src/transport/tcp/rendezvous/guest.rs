//! The other ranks' side of the meeting.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::host::mesh_key;
use super::lifeline::{GRACE, Lifeline};
use super::note::Note;
use super::proof::{self, Claim, Key, Purpose};
use super::stream::Stream;
use super::{Identity, Meeting, PROTOCOL_VERSION, Roster, rendezvous};
use crate::error::{Error, Result};

/// Pause between two attempts to reach rank 0.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the proof may take, once connected.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

/// After so many failed proofs the secrets differ for sure.
const PROOF_ATTEMPTS: u32 = 3;

/// Finds rank 0, says who we are, and waits for the roster.
pub(super) fn join(
    identity: Identity,
    meeting: &Meeting,
    mut address: SocketAddr,
    deadline: Instant,
) -> Result<(Roster, Lifeline)> {
    let mut stream = reach(identity, meeting, deadline)?;
    if let (true, Some(ip)) = (address.ip().is_unspecified(), stream.local_ip()) {
        address.set_ip(ip);
    }
    let Identity { rank, size, generation } = identity;
    let hello = Note::Hello { version: PROTOCOL_VERSION, rank, size, generation, listener: address };
    hello.send(&mut stream, deadline).map_err(lost)?;
    match Note::receive(&mut stream, deadline + GRACE).map_err(lost)? {
        Note::Roster { mut addresses, seed } if addresses.len() == size => {
            if let (true, Some(ip)) = (addresses[0].ip().is_unspecified(), stream.peer_ip()) {
                addresses[0].set_ip(ip);
            }
            Ok((Roster { addresses, key: mesh_key(meeting, &seed) }, Lifeline::Guest(stream, false)))
        }
        Note::Failed { text } => Err(rendezvous(text)),
        other => Err(rendezvous(format!("rank 0 said {other:?} instead of the roster"))),
    }
}

/// The name of a job's socket among those without a file. Of a fixed length, whatever the job is called.
pub(super) fn abstract_name(identity: Identity, job: &str) -> String {
    let user = rustix::process::getuid().as_raw();
    let digest = Sha256::digest(job.as_bytes());
    let digest: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("hvd/{user}/{digest}/{}", identity.generation)
}

/// Refuses the other end of a Unix socket unless it is a process of this user.
pub(super) fn check_user(stream: &Stream) -> io::Result<()> {
    let theirs = rustix::net::sockopt::socket_peercred(stream)?.uid;
    if theirs == rustix::process::getuid() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("the other end runs as user {}", theirs.as_raw())))
}

/// Tries until rank 0 is there and has proved to be it.
fn reach(identity: Identity, meeting: &Meeting, deadline: Instant) -> Result<Stream> {
    let mut failed_proofs = 0;
    loop {
        let error = match connect(identity, meeting, deadline) {
            Ok(mut stream) => match prove(identity, meeting, &mut stream, deadline) {
                Ok(()) => return Ok(stream),
                Err(error) => {
                    // A connection that is merely lost proves nothing: strangers may crowd the door.
                    failed_proofs += u32::from(error.kind() == io::ErrorKind::PermissionDenied);
                    error
                }
            },
            Err(error) => error,
        };
        if failed_proofs >= PROOF_ATTEMPTS || Instant::now() + RETRY_PAUSE >= deadline {
            return Err(unreachable_host(meeting, failed_proofs > 0, &error));
        }
        std::thread::sleep(RETRY_PAUSE);
    }
}

fn connect(identity: Identity, meeting: &Meeting, deadline: Instant) -> io::Result<Stream> {
    match meeting {
        Meeting::Unix { job } => {
            let address = std::os::unix::net::SocketAddr::from_abstract_name(abstract_name(identity, job))?;
            UnixStream::connect_addr(&address).map(Stream::Unix)
        }
        Meeting::Tcp { address, .. } => {
            let mut result = Err(io::Error::other("the name has no address"));
            for address in address.to_socket_addrs()? {
                result = connect_tcp(&address, deadline);
                if result.is_ok() {
                    break;
                }
            }
            result
        }
    }
}

/// Connects to an address, for a bounded time.
pub(super) fn connect_tcp(address: &SocketAddr, deadline: Instant) -> io::Result<Stream> {
    let left = deadline.saturating_duration_since(Instant::now()).min(CONNECT_TIMEOUT);
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let stream = TcpStream::connect_timeout(address, left)?;
    // A port out of the range that connections come from can, without a listener, be connected to itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(Stream::Tcp(stream))
}

fn prove(identity: Identity, meeting: &Meeting, stream: &mut Stream, deadline: Instant) -> io::Result<()> {
    match meeting {
        Meeting::Unix { .. } => check_user(stream),
        Meeting::Tcp { secret, .. } => {
            let Identity { rank, generation, .. } = identity;
            let claim = Claim { purpose: Purpose::Meeting, generation, caller: rank as u32, callee: 0 };
            let deadline = deadline.min(Instant::now() + PROOF_TIMEOUT);
            proof::as_caller(stream, &Key::new(&secret.0), claim, deadline)
        }
    }
}

fn unreachable_host(meeting: &Meeting, proof_failed: bool, error: &io::Error) -> Error {
    let text = match (meeting, proof_failed) {
        (Meeting::Tcp { address, .. }, true) => format!(
            "rank 0 at {address} and this rank do not believe each other ({error}); check that HVD_SECRET is the same \
             on all ranks and that nothing else listens there"
        ),
        (Meeting::Tcp { address, .. }, false) => format!(
            "cannot reach rank 0 at {address} ({error}); check that it was started, that the address is right \
             (HVD_RENDEZVOUS), that nothing else listens there and that no firewall is between"
        ),
        (Meeting::Unix { job }, _) => format!(
            "cannot reach rank 0 of the job `{job}` on this host ({error}); check that it was started here with the \
             same HVD_JOB_ID; ranks on several hosts need HVD_RENDEZVOUS and HVD_SECRET"
        ),
    };
    rendezvous(text)
}

fn lost(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::TimedOut => rendezvous("rank 0 did not answer in time; see its own messages for who is missing"),
        _ => rendezvous(format!("lost rank 0 during the start: {error}")),
    }
}
