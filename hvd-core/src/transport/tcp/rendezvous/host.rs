//! Rank 0's side of the meeting.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::doorman::{Doorman, Ticket};
use super::lifeline::{Guest, Lifeline};
use super::note::Note;
use super::proof::{self, Claim, Key, Purpose};
use super::stream::{Listener, Stream};
use super::{Identity, Meeting, PROTOCOL_VERSION, Roster, guest, random_bytes, rendezvous};
use crate::error::{Error, Result};
use crate::topology::listed;

/// How long rank 0 waits for a predecessor to leave the meeting point.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(3);

/// How long sending the roster to one rank may take.
const ROSTER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long rank 0 stays to tell latecomers of a start that has failed, also after the deadline (it leaves at once when all have
/// been told). Each rank's own `start_timeout` begins when that rank does: one that knocks a moment after rank 0 has gone would
/// wait as long again, and could not say who was missing.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// A caller that has proved to belong to the job.
struct Caller {
    stream: Stream,
    hello: Note,
}

/// Gathers all ranks and sends them the roster.
pub(super) fn host(
    identity: Identity,
    meeting: &Meeting,
    address: SocketAddr,
    deadline: Instant,
) -> Result<(Roster, Lifeline)> {
    let doorman = open(identity, meeting, deadline)?;
    let mut lifeline = Lifeline::Host(Vec::new());
    let mut addresses = vec![None; identity.size];
    addresses[0] = Some(address);
    let seed = random_bytes()?;
    let gathered = receive_all(identity, meeting, &doorman, &mut lifeline, &mut addresses, deadline)
        .and_then(|()| send_roster(&mut lifeline, &addresses, seed));
    gathered.inspect_err(|error| {
        lifeline.tell_failure(0, error);
        let missing = identity.size - 1 - lifeline.streams().len();
        tell_latecomers(&doorman, missing, error, Instant::now() + FAREWELL_TIMEOUT);
    })?;
    let addresses = addresses.into_iter().flatten().collect();
    Ok((Roster { addresses, key: mesh_key(meeting, &seed) }, lifeline))
}

/// The key of the mesh: who listens on the wire hears the seed, but not the secret.
pub(super) fn mesh_key(meeting: &Meeting, seed: &[u8; 32]) -> Key {
    match meeting {
        Meeting::Unix { .. } => Key::new(seed),
        Meeting::Tcp { secret, .. } => Key::new(&secret.0).derive(seed),
    }
}

fn receive_all(
    identity: Identity,
    meeting: &Meeting,
    doorman: &Doorman<Caller>,
    lifeline: &mut Lifeline,
    addresses: &mut [Option<SocketAddr>],
    deadline: Instant,
) -> Result<()> {
    while addresses.iter().any(Option::is_none) {
        if Instant::now() >= deadline {
            return Err(missing(meeting, addresses));
        }
        let positions = doorman.wait(&lifeline.streams(), deadline)?;
        lifeline.hear(&positions)?;
        while let Some(caller) = doorman.next() {
            admit(identity, caller, lifeline, addresses)?;
        }
    }
    Ok(())
}

/// Stays a moment to tell those who come after the start has failed. Without it they would look for rank 0 in vain.
fn tell_latecomers(doorman: &Doorman<Caller>, mut expected: usize, error: &Error, deadline: Instant) {
    let text = match error {
        Error::Rendezvous(text) => text.clone(),
        other => format!("rank 0 failed: {other}"),
    };
    loop {
        // Also those who came just before the start failed, or with the deadline.
        while let Some(mut caller) = doorman.next() {
            let _ = Note::Failed { text: text.clone() }.send(&mut caller.stream, Instant::now() + ROSTER_TIMEOUT);
            expected = expected.saturating_sub(1);
        }
        if expected == 0 || Instant::now() >= deadline || doorman.wait(&[], deadline).is_err() {
            return;
        }
    }
}

/// Takes a rank in, or fails the start of all if it cannot belong to this world.
fn admit(
    identity: Identity,
    mut caller: Caller,
    lifeline: &mut Lifeline,
    addresses: &mut [Option<SocketAddr>],
) -> Result<()> {
    let Note::Hello { version, rank, size, generation, listener } = caller.hello else {
        return Ok(()); // The greeting lets nothing else through.
    };
    let fault = if version != PROTOCOL_VERSION {
        format!(
            "rank {rank} speaks version {version} of the protocol, rank 0 version {PROTOCOL_VERSION}; run one build"
        )
    } else if generation != identity.generation {
        format!("rank {rank} is in generation {generation} of the world, rank 0 in {}", identity.generation)
    } else if size != identity.size {
        format!(
            "rank {rank} believes in a world of {size}, rank 0 in one of {}; give all ranks the same size",
            identity.size
        )
    } else if rank >= size {
        format!("rank {rank} cannot be in a world of {size}")
    } else if addresses[rank].is_some() {
        format!("two processes say that they are rank {rank}; give each its own, or each job its own meeting point")
    } else {
        addresses[rank] = Some(listener);
        if let Lifeline::Host(guests) = lifeline {
            guests.push(Guest { rank, stream: caller.stream, ready: false });
        }
        return Ok(());
    };
    let _ = Note::Failed { text: fault.clone() }.send(&mut caller.stream, Instant::now() + ROSTER_TIMEOUT);
    Err(rendezvous(fault))
}

fn send_roster(lifeline: &mut Lifeline, addresses: &[Option<SocketAddr>], seed: [u8; 32]) -> Result<()> {
    let Lifeline::Host(guests) = lifeline else { return Ok(()) };
    let note = Note::Roster { addresses: addresses.iter().flatten().copied().collect(), seed };
    for guest in guests {
        note.send(&mut guest.stream, Instant::now() + ROSTER_TIMEOUT)
            .map_err(|error| rendezvous(format!("lost rank {} during the start: {error}", guest.rank)))?;
    }
    Ok(())
}

fn missing(meeting: &Meeting, addresses: &[Option<SocketAddr>]) -> Error {
    let missing: Vec<_> = (0..addresses.len()).filter(|rank| addresses[*rank].is_none()).collect();
    let what = match meeting {
        Meeting::Unix { job } => format!("they run on this host, as this user, for the job `{job}`"),
        Meeting::Tcp { address, .. } => format!("they can reach {address} and have the same secret"),
    };
    rendezvous(format!(
        "of {} ranks these did not come in time: {}; check that they were started and that {what} \
         (HVD_START_TIMEOUT sets how long to wait)",
        addresses.len(),
        listed(missing)
    ))
}

/// Opens the meeting point.
fn open(identity: Identity, meeting: &Meeting, deadline: Instant) -> Result<Doorman<Caller>> {
    match meeting {
        Meeting::Unix { job } => {
            let listener = listen_unix(identity, job, deadline)?;
            Doorman::new(listener, greet_unix)
        }
        Meeting::Tcp { address, secret } => {
            let listener = TcpListener::bind(address.as_str())
                .and_then(Listener::tcp)
                .map_err(|error| rendezvous(format!("rank 0 cannot listen on {address}: {error}")))?;
            let key = Key::new(&secret.0);
            Doorman::new(listener, move |stream, deadline, ticket| greet_tcp(stream, &key, deadline, ticket))
        }
    }
}

/// Listens on the job's name, which a world that is just ending may still hold.
fn listen_unix(identity: Identity, job: &str, deadline: Instant) -> Result<Listener> {
    let deadline = deadline.min(Instant::now() + PREDECESSOR_TIMEOUT);
    loop {
        let listener = std::os::unix::net::SocketAddr::from_abstract_name(guest::abstract_name(identity, job))
            .and_then(|address| UnixListener::bind_addr(&address))
            .and_then(Listener::unix);
        match listener {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(rendezvous(format!(
                    "another process holds the meeting point of the job `{job}`; give each job its own (HVD_JOB_ID)"
                )));
            }
            Err(error) => return Err(Error::io("listening on a Unix socket", error)),
        }
    }
}

fn greet_unix(mut stream: Stream, deadline: Instant, ticket: &Ticket) -> io::Result<Caller> {
    guest::check_user(&stream)?;
    ticket.settle();
    let hello = receive_hello(&mut stream, deadline)?;
    Ok(Caller { stream, hello })
}

/// A rank of another generation is let in, too: it is told so.
fn greet_tcp(mut stream: Stream, key: &Key, deadline: Instant, ticket: &Ticket) -> io::Result<Caller> {
    let welcome = |claim: &Claim| claim.purpose == Purpose::Meeting && claim.callee == 0 && ticket.settle();
    let claim = proof::as_callee(&mut stream, key, welcome, deadline)?;
    let hello = receive_hello(&mut stream, deadline)?;
    match hello {
        Note::Hello { rank, generation, .. }
            if (rank as u64, generation) == (claim.caller.into(), claim.generation) =>
        {
            Ok(Caller { stream, hello })
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the caller says two ranks")),
    }
}

fn receive_hello(stream: &mut Stream, deadline: Instant) -> io::Result<Note> {
    match Note::receive(stream, deadline)? {
        hello @ Note::Hello { .. } => Ok(hello),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{other:?} instead of a hello"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_rank_that_was_heard_as_the_start_failed_is_told() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(Listener::tcp).expect("a listener");
        let doorman = Doorman::new(listener, greet_unix).expect("a doorman");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let listener = (Ipv4Addr::LOCALHOST, 1).into();
        let hello = Note::Hello { version: PROTOCOL_VERSION, rank: 1, size: 3, generation: 0, listener };
        doorman.bell().send(Caller { stream: Stream::Unix(ours), hello });
        // The bell has been heard, but the caller not yet let in.
        let deadline = Instant::now() + Duration::from_secs(60);
        doorman.wait(&[], deadline).expect("the bell");

        // It is told although rank 0 has no time left.
        tell_latecomers(&doorman, 1, &rendezvous("lost rank 2"), Instant::now());
        let told = Note::receive(&mut Stream::Unix(theirs), deadline).expect("a note");
        assert_eq!(told, Note::Failed { text: "lost rank 2".into() });
    }

    #[test]
    fn a_rank_that_knocks_after_the_start_has_failed_is_told() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let address = listener.local_addr().expect("an address");
        let deadline = Instant::now() + Duration::from_secs(60);
        let greet = |mut stream: Stream, deadline, _: &Ticket| {
            let hello = receive_hello(&mut stream, deadline)?;
            Ok(Caller { stream, hello })
        };
        let doorman = Doorman::new(Listener::tcp(listener).expect("a listener"), greet).expect("a doorman");
        let mut late = guest::connect_tcp(&address, deadline).expect("a connection");
        let hello = Note::Hello { version: PROTOCOL_VERSION, rank: 1, size: 2, generation: 0, listener: address };
        hello.send(&mut late, deadline).expect("sending");

        tell_latecomers(&doorman, 1, &rendezvous("it is over"), deadline);
        let told = Note::receive(&mut late, deadline).expect("a note");
        assert_eq!(told, Note::Failed { text: "it is over".into() });
    }
}
