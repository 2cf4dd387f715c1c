//! A connection between each two ranks, and another for the heartbeats of neighbours: the higher rank calls, the lower
//! one is called.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::doorman::{Doorbell, Doorman, Ticket};
use super::lifeline::Lifeline;
use super::proof::{self, Claim, Key, Purpose};
use super::stream::{Listener, Stream};
use super::{Identity, Roster, guest, rendezvous};
use crate::error::{Error, Result};
use crate::transport::tcp::heartbeat::neighbours;

/// How often a call may be refused before it counts as failed.
const ATTEMPTS: u32 = 5;

/// How long one proof may take.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

/// Calls at a time: a rank that does not answer must not keep this one from the others.
const CALLERS: usize = 16;

/// A connection to a rank and what it is for, or why there is none.
type Connected = Result<(Purpose, usize, TcpStream)>;

/// A rank's connections.
pub(in crate::transport::tcp) struct Connections {
    /// For messages, one to each rank but this one.
    pub(in crate::transport::tcp) mesh: Vec<Option<TcpStream>>,
    /// For beats, one to each neighbour.
    pub(in crate::transport::tcp) heartbeat: Vec<(usize, TcpStream)>,
}

impl Connections {
    /// None yet, among `size` ranks.
    pub(in crate::transport::tcp) fn none(size: usize) -> Self {
        Connections { mesh: (0..size).map(|_| None).collect(), heartbeat: Vec::new() }
    }

    /// A rank that calls twice has given up its first call.
    fn add(&mut self, purpose: Purpose, peer: usize, stream: TcpStream) {
        if purpose == Purpose::Heartbeat {
            self.heartbeat.retain(|(other, _)| *other != peer);
            self.heartbeat.push((peer, stream));
        } else {
            self.mesh[peer] = Some(stream);
        }
    }

    /// The ranks that are not connected yet.
    fn missing(&self, rank: usize) -> Vec<usize> {
        let beats = |peer: &usize| self.heartbeat.iter().any(|(other, _)| other == peer);
        let neighbours = neighbours(rank, self.mesh.len());
        let lacks = |peer: &usize| self.mesh[*peer].is_none() || (neighbours.contains(peer) && !beats(peer));
        (0..self.mesh.len()).filter(|peer| *peer != rank && lacks(peer)).collect()
    }
}

/// Connects with all other ranks and waits until they have done so, too.
pub(super) fn build(
    identity: Identity,
    listener: TcpListener,
    roster: &Roster,
    lifeline: &mut Lifeline,
    deadline: Instant,
) -> Result<Connections> {
    let listener = Listener::tcp(listener).map_err(|error| Error::io("preparing a listener", error))?;
    let key = roster.key.clone();
    let doorman =
        Doorman::new(listener, move |stream, deadline, ticket| greet(identity, stream, &key, deadline, ticket))?;
    let given_up = Arc::new(AtomicBool::new(false));
    start_caller(identity, roster, doorman.bell(), given_up.clone(), deadline)?;
    let connections = connect_all(identity, &doorman, lifeline, deadline).and_then(|connections| {
        lifeline.finish(&doorman, deadline)?;
        Ok(connections)
    });
    given_up.store(true, Ordering::Release);
    connections
}

fn connect_all(
    identity: Identity,
    doorman: &Doorman<Connected>,
    lifeline: &mut Lifeline,
    deadline: Instant,
) -> Result<Connections> {
    let mut connections = Connections::none(identity.size);
    loop {
        let missing = connections.missing(identity.rank);
        if missing.is_empty() {
            return Ok(connections);
        }
        if Instant::now() >= deadline {
            return Err(rendezvous(format!("rank {} was not connected in time with ranks {missing:?}", identity.rank)));
        }
        let positions = doorman.wait(&lifeline.streams(), deadline)?;
        lifeline.hear(&positions)?;
        while let Some(connected) = doorman.next() {
            let (purpose, peer, stream) = connected?;
            connections.add(purpose, peer, stream);
        }
    }
}

/// Has a higher rank prove that it is one.
fn greet(
    identity: Identity,
    mut stream: Stream,
    key: &Key,
    deadline: Instant,
    ticket: &Ticket,
) -> io::Result<Connected> {
    let welcome = |claim: &Claim| is_welcome(identity, claim) && ticket.settle();
    let claim = proof::as_callee(&mut stream, key, welcome, deadline)?;
    match stream {
        Stream::Tcp(stream) => Ok(Ok((claim.purpose, claim.caller as usize, stream))),
        Stream::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Whether a call is one that this rank waits for.
fn is_welcome(identity: Identity, claim: &Claim) -> bool {
    let Identity { rank, size, generation } = identity;
    let caller = claim.caller as usize;
    let purpose = match claim.purpose {
        Purpose::Meeting => false,
        Purpose::Mesh => true,
        Purpose::Heartbeat => neighbours(rank, size).contains(&caller),
    };
    purpose && claim.generation == generation && claim.callee as usize == rank && (rank + 1..size).contains(&caller)
}

/// Calls all lower ranks, on threads of their own.
fn start_caller(
    identity: Identity,
    roster: &Roster,
    bell: Doorbell<Connected>,
    given_up: Arc<AtomicBool>,
    deadline: Instant,
) -> Result<()> {
    let mesh = (0..identity.rank).map(|peer| (Purpose::Mesh, peer));
    let beats = neighbours(identity.rank, identity.size).into_iter().map(|peer| (Purpose::Heartbeat, peer));
    let calls = mesh.chain(beats.filter(|(_, peer)| *peer < identity.rank));
    let calls: Vec<_> = calls.map(|(purpose, peer)| (purpose, peer, roster.addresses[peer])).collect();
    let (callers, calls) = (calls.len().min(CALLERS), Arc::new(Mutex::new(calls.into_iter())));
    for _ in 0..callers {
        let (calls, key, bell, given_up) = (calls.clone(), roster.key.clone(), bell.clone(), given_up.clone());
        let next = move || calls.lock().next();
        let run = move || {
            while let Some((purpose, peer, address)) = next().filter(|_| !given_up.load(Ordering::Acquire)) {
                bell.send(call(identity, purpose, peer, &address, &key, deadline));
            }
        };
        let thread = std::thread::Builder::new().name("hvd-connect".into()).spawn(run);
        thread.map_err(|error| Error::io("starting a thread", error))?;
    }
    Ok(())
}

/// Calls one rank. It listens already, so a refusal is a real one, but for a passing shortage; a connection that is lost
/// may be tried again: strangers may crowd its door.
fn call(
    identity: Identity,
    purpose: Purpose,
    peer: usize,
    address: &SocketAddr,
    key: &Key,
    deadline: Instant,
) -> Connected {
    let Identity { rank, generation, .. } = identity;
    let claim = Claim { purpose, generation, caller: rank as u32, callee: peer as u32 };
    let mut refusals = 0;
    loop {
        let proved = guest::connect_tcp(address, deadline).and_then(|mut stream| {
            proof::as_caller(&mut stream, key, claim, deadline.min(Instant::now() + PROOF_TIMEOUT))?;
            Ok(stream)
        });
        match proved {
            Ok(Stream::Tcp(stream)) => return Ok((purpose, peer, stream)),
            Err(error) if refusals >= ATTEMPTS || Instant::now() >= deadline => {
                return Err(rendezvous(format!(
                    "rank {} cannot connect to rank {peer} at {address}: {error}; ranks on several hosts need HVD_BIND \
                     (an address that the other hosts reach)",
                    identity.rank
                )));
            }
            Err(error) => {
                let refused =
                    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::PermissionDenied);
                refusals += u32::from(refused);
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(Stream::Unix(_)) => return Err(rendezvous("a Unix socket in the mesh")),
        }
    }
}
