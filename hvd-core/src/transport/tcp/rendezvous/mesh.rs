//! A connection between each two ranks: the higher rank calls, the lower one is called.

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

/// How often a call is tried before it counts as failed.
const ATTEMPTS: u32 = 5;

/// How long one proof may take.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to a rank, or why there is none.
type Connected = Result<(usize, TcpStream)>;

/// Connects with all other ranks and waits until they have done so, too.
pub(super) fn build(
    identity: Identity,
    listener: TcpListener,
    roster: &Roster,
    lifeline: &mut Lifeline,
    deadline: Instant,
) -> Result<Vec<Option<TcpStream>>> {
    let listener = Listener::tcp(listener).map_err(|error| Error::io("preparing a listener", error))?;
    let key = roster.key.clone();
    let doorman = Doorman::new(listener, move |stream, deadline| greet(identity, stream, &key, deadline))?;
    let given_up = Arc::new(AtomicBool::new(false));
    start_caller(identity, roster, doorman.bell(), given_up.clone(), deadline)?;
    let streams = connect_all(identity, &doorman, lifeline, deadline).and_then(|streams| {
        lifeline.finish(&doorman, deadline)?;
        Ok(streams)
    });
    given_up.store(true, Ordering::Release);
    streams
}

fn connect_all(
    identity: Identity,
    doorman: &Doorman<Connected>,
    lifeline: &mut Lifeline,
    deadline: Instant,
) -> Result<Vec<Option<TcpStream>>> {
    let mut streams: Vec<Option<TcpStream>> = (0..identity.size).map(|_| None).collect();
    let mut missing = identity.size - 1;
    while missing > 0 {
        if Instant::now() >= deadline {
            let late: Vec<_> = (0..identity.size).filter(|r| *r != identity.rank && streams[*r].is_none()).collect();
            return Err(rendezvous(format!("rank {} was not connected in time with ranks {late:?}", identity.rank)));
        }
        let positions = doorman.wait(&lifeline.streams(), deadline)?;
        lifeline.hear(&positions)?;
        while let Some(connected) = doorman.next() {
            let (peer, stream) = connected?;
            // A rank that calls twice has given up its first call.
            if streams[peer].replace(stream).is_none() {
                missing -= 1;
            }
        }
    }
    Ok(streams)
}

/// Has a higher rank prove that it is one.
fn greet(identity: Identity, mut stream: Stream, key: &Key, deadline: Instant) -> io::Result<Connected> {
    let callee = identity.rank as u32;
    let expected = Claim { purpose: Purpose::Mesh, generation: identity.generation, caller: 0, callee };
    let caller = proof::as_callee(&mut stream, key, expected, deadline)?;
    match stream {
        Stream::Tcp(stream) if (identity.rank + 1..identity.size).contains(&caller) => Ok(Ok((caller, stream))),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("rank {caller} has no business here"))),
    }
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
        for (peer, address) in addresses.iter().enumerate() {
            if given_up.load(Ordering::Acquire) {
                return;
            }
            bell.send(call(identity, peer, address, &key, deadline));
        }
    };
    let thread = std::thread::Builder::new().name("hvd-connect".into()).spawn(run);
    thread.map(drop).map_err(|error| Error::io("starting a thread", error))
}

/// Calls one rank. It listens already, so a failure is a real one, but for a passing shortage.
fn call(identity: Identity, peer: usize, address: &SocketAddr, key: &Key, deadline: Instant) -> Connected {
    let claim = Claim {
        purpose: Purpose::Mesh,
        generation: identity.generation,
        caller: identity.rank as u32,
        callee: peer as u32,
    };
    let mut attempt = 0;
    loop {
        attempt += 1;
        let proved = guest::connect_tcp(address, deadline).and_then(|mut stream| {
            proof::as_caller(&mut stream, key, claim, deadline.min(Instant::now() + PROOF_TIMEOUT))?;
            Ok(stream)
        });
        match proved {
            Ok(Stream::Tcp(stream)) => return Ok((peer, stream)),
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
