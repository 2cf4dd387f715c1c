//! A connection between each two ranks, and another for the heartbeats of neighbours: the higher rank calls, the lower
//! one is called.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::doorman::{Doorbell, Doorman};
use super::lifeline::Lifeline;
use super::proof::{self, Claim, Key, Purpose};
use super::stream::{Listener, Stream};
use super::{Identity, Roster, guest, rendezvous};
use crate::error::{Error, Result};
use crate::transport::tcp::heartbeat::neighbours;

/// How often a call is tried before it counts as failed.
const ATTEMPTS: u32 = 5;

/// How long one proof may take.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

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
    let doorman = Doorman::new(listener, move |stream, deadline| greet(identity, stream, &key, deadline))?;
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
fn greet(identity: Identity, mut stream: Stream, key: &Key, deadline: Instant) -> io::Result<Connected> {
    let claim = proof::as_callee(&mut stream, key, |claim| is_welcome(identity, claim), deadline)?;
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

/// Calls all lower ranks, on a thread of its own.
fn start_caller(
    identity: Identity,
    roster: &Roster,
    bell: Doorbell<Connected>,
    given_up: Arc<AtomicBool>,
    deadline: Instant,
) -> Result<()> {
    let addresses = roster.addresses[..identity.rank].to_vec();
    let key = roster.key.clone();
    let run = move || {
        let mesh = (0..addresses.len()).map(|peer| (Purpose::Mesh, peer));
        let beats = neighbours(identity.rank, identity.size).into_iter().map(|peer| (Purpose::Heartbeat, peer));
        for (purpose, peer) in mesh.chain(beats.filter(|(_, peer)| *peer < identity.rank)) {
            if given_up.load(Ordering::Acquire) {
                return;
            }
            bell.send(call(identity, purpose, peer, &addresses[peer], &key, deadline));
        }
    };
    let thread = std::thread::Builder::new().name("hvd-connect".into()).spawn(run);
    thread.map(drop).map_err(|error| Error::io("starting a thread", error))
}

/// Calls one rank. It listens already, so a failure is a real one, but for a passing shortage.
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
    let mut attempt = 0;
    loop {
        attempt += 1;
        let proved = guest::connect_tcp(address, deadline).and_then(|mut stream| {
            proof::as_caller(&mut stream, key, claim, deadline.min(Instant::now() + PROOF_TIMEOUT))?;
            Ok(stream)
        });
        match proved {
            Ok(Stream::Tcp(stream)) => return Ok((purpose, peer, stream)),
            Err(error) if attempt >= ATTEMPTS || Instant::now() >= deadline => {
                return Err(rendezvous(format!(
                    "rank {} cannot connect to rank {peer} at {address}: {error}; ranks on several hosts need HVD_BIND \
                     (an address that the other hosts reach)",
                    identity.rank
                )));
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
