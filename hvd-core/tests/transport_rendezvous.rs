//! How ranks find each other: over both kinds of meeting points, with strangers about, and with ranks that do not fit.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use hvd_core::transport::tcp::{Identity, Meeting, Secret, TcpOptions, TcpTransport};
use hvd_core::{Error, Result};
use support::*;

const SECRET: &str = "correct horse battery staple";

fn tcp_meeting(address: &str, secret: &str) -> Meeting {
    Meeting::Tcp { address: address.into(), secret: Secret::new(secret).unwrap() }
}

/// An address that nobody listens on.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn patient(seconds: u64) -> TcpOptions {
    TcpOptions { start_timeout: Duration::from_secs(seconds), ..TcpOptions::default() }
}

/// Connects ranks with these identities at the same time.
fn connect(identities: &[Identity], meeting: &Meeting, options: &TcpOptions) -> Vec<Result<TcpTransport>> {
    std::thread::scope(|scope| {
        let start = |identity: &Identity| {
            let identity = *identity;
            scope.spawn(move || TcpTransport::connect(identity, meeting, options))
        };
        let threads: Vec<_> = identities.iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn ranks(size: usize) -> Vec<Identity> {
    (0..size).map(|rank| identity(rank, size)).collect()
}

/// Sees that every rank hears every other, then closes.
fn check_world(world: Vec<Result<TcpTransport>>) {
    let world: Vec<_> = world.into_iter().map(|rank| Box::new(rank.expect("connecting")) as Rank).collect();
    on_each(world, |mut rank| {
        let (me, size) = (rank.rank(), rank.size());
        for peer in 0..size {
            rank.send(peer, tag(0), memory(&[me as u8])).unwrap();
        }
        for peer in 0..size {
            assert_eq!(receive_any(&mut *rank, peer, tag(0)).unwrap(), [peer as u8]);
        }
        close(rank);
    });
}

/// The errors of a start that must fail on all ranks, and fast.
fn errors_of(identities: &[Identity]) -> Vec<String> {
    let begin = Instant::now();
    let meeting = Meeting::Unix { job: fresh_job() };
    let errors: Vec<_> = connect(identities, &meeting, &patient(50))
        .into_iter()
        .map(|rank| rank.err().expect("this world cannot be").to_string())
        .collect();
    assert!(begin.elapsed() < Duration::from_secs(20), "it took {:?}", begin.elapsed());
    errors
}

#[test]
fn ranks_meet_at_an_address() {
    watched(|| check_world(connect(&ranks(4), &tcp_meeting(&free_address(), SECRET), &patient(30))));
}

#[test]
fn a_world_listens_on_all_addresses_if_told_so() {
    watched(|| {
        let options = TcpOptions { bind: Some("0.0.0.0".parse().unwrap()), ..patient(30) };
        check_world(connect(&ranks(3), &tcp_meeting(&free_address(), SECRET), &options));
    });
}

#[test]
fn rank_0_may_come_last() {
    watched(|| {
        for meeting in [Meeting::Unix { job: fresh_job() }, tcp_meeting(&free_address(), SECRET)] {
            let world = std::thread::scope(|scope| {
                let others = scope.spawn(|| connect(&ranks(3)[1..], &meeting, &patient(30)));
                std::thread::sleep(Duration::from_millis(150)); // Only makes the case likely.
                let mut world = connect(&ranks(3)[..1], &meeting, &patient(30));
                world.extend(others.join().unwrap());
                world
            });
            check_world(world);
        }
    });
}

#[test]
fn a_job_can_form_one_world_after_the_other() {
    watched(|| {
        let meeting = Meeting::Unix { job: fresh_job() };
        for generation in [0, 0, 1] {
            let identities: Vec<_> = ranks(3).into_iter().map(|rank| Identity { generation, ..rank }).collect();
            check_world(connect(&identities, &meeting, &patient(30)));
        }
    });
}

#[test]
fn a_rank_that_is_missing_is_named() {
    watched(|| {
        let options = TcpOptions { start_timeout: Duration::from_millis(400), ..TcpOptions::default() };
        let meeting = Meeting::Unix { job: fresh_job() };
        for rank in connect(&ranks(4)[..3], &meeting, &options) {
            let error = rank.err().expect("rank 3 is missing").to_string();
            assert!(error.contains("did not come in time: rank 3;"), "{error}");
        }
        let error = connect(&ranks(2)[1..], &meeting, &options).remove(0).err().expect("rank 0 is missing").to_string();
        assert!(error.contains("cannot reach rank 0"), "{error}");
    });
}

#[test]
fn two_of_one_rank_are_refused_everywhere() {
    watched(|| {
        let mut identities = ranks(4);
        identities[3].rank = 2;
        for error in errors_of(&identities) {
            assert!(error.contains("two processes say that they are rank 2"), "{error}");
        }
    });
}

#[test]
fn different_sizes_are_refused_everywhere() {
    watched(|| {
        let mut identities = ranks(3);
        identities[1].size = 4;
        let errors = errors_of(&identities);
        assert!(errors.iter().any(|error| error.contains("believes in a world of 4")), "{errors:?}");
    });
}

#[test]
fn weak_secrets_and_open_listeners_are_refused() {
    assert!(matches!(Secret::new("short"), Err(Error::Config(_))));
    let open = TcpOptions { bind: Some("0.0.0.0".parse().unwrap()), ..patient(5) };
    let refused = TcpTransport::connect(identity(0, 2), &Meeting::Unix { job: fresh_job() }, &open);
    assert!(matches!(refused, Err(Error::Config(_))));
    assert!(matches!(
        TcpTransport::connect(identity(2, 2), &Meeting::Unix { job: fresh_job() }, &patient(5)),
        Err(Error::Config(_))
    ));
}

#[test]
fn a_rank_with_another_secret_is_turned_away() {
    watched(|| {
        let address = free_address();
        std::thread::scope(|scope| {
            let host = scope.spawn(|| connect(&ranks(2)[..1], &tcp_meeting(&address, SECRET), &patient(30)));
            let wrong = connect(&ranks(2)[1..], &tcp_meeting(&address, "some other secret"), &patient(30)).remove(0);
            let error = wrong.err().expect("the secret is wrong").to_string();
            assert!(error.contains("HVD_SECRET"), "{error}");
            let mut world = connect(&ranks(2)[1..], &tcp_meeting(&address, SECRET), &patient(30));
            world.insert(0, host.join().unwrap().remove(0));
            check_world(world);
        });
    });
}

/// A rank that says hello and dies must not keep the others until the deadline.
#[test]
fn a_rank_that_dies_during_the_start_ends_it() {
    watched(|| {
        let job = fresh_job();
        let meeting = Meeting::Unix { job: job.clone() };
        let begin = Instant::now();
        let errors = std::thread::scope(|scope| {
            let others = scope.spawn(|| connect(&ranks(4)[..3], &meeting, &patient(50)));
            // Variant 0 is the hello: version 2, rank 3, size 4, generation 0, listener 127.0.0.1:1.
            let hello = [0, 2, 3, 4, 0, 0, 127, 0, 0, 1, 1];
            let mut stream = unix_meeting_point(&job);
            stream.write_all(&(hello.len() as u32).to_le_bytes()).unwrap();
            stream.write_all(&hello).unwrap();
            drop(stream);
            others.join().unwrap()
        });
        for rank in errors {
            let error = rank.err().expect("rank 3 is dead").to_string();
            assert!(error.contains("lost rank 3") || error.contains("connect to rank 3"), "{error}");
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "it took {:?}", begin.elapsed());
    });
}

/// Connects to a job's Unix socket as soon as it is there. The name is part of the protocol.
fn unix_meeting_point(job: &str) -> UnixStream {
    use sha2::Digest;
    let digest: String = sha2::Sha256::digest(job)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("hvd/{}/{digest}/0", rustix::process::getuid().as_raw());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    loop {
        match UnixStream::connect_addr(&address) {
            Ok(stream) => return stream,
            Err(_) => std::thread::yield_now(),
        }
    }
}

/// What strangers may throw at a listener, each on a connection of its own. Gives the connections, some of which must
/// stay open to be a nuisance.
fn strangers(mut connect: impl FnMut() -> Box<dyn Stranger>) -> Vec<Box<dyn Stranger>> {
    let mut connections = Vec::new();
    let texts: [&[u8]; 6] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
        &[0xff; 200],
        &[0; 4096],
        &u32::MAX.to_le_bytes(),
        b"HVDauth1 and then nothing more that makes sense",
    ];
    for text in texts {
        for close_at_once in [true, false] {
            let mut stream = connect();
            let _ = stream.write_all(text);
            if !close_at_once {
                connections.push(stream);
            }
        }
    }
    connections
}

trait Stranger: Write + Send {}
impl<T: Write + Send> Stranger for T {}

fn tcp_stranger(address: &str) -> TcpStream {
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn strangers_at_the_meeting_point_change_nothing() {
    watched(|| {
        let address = free_address();
        let meeting = tcp_meeting(&address, SECRET);
        std::thread::scope(|scope| {
            let host = scope.spawn(|| connect(&ranks(3)[..1], &meeting, &patient(30)));
            let _open = strangers(|| Box::new(tcp_stranger(&address)));
            let mut world = connect(&ranks(3)[1..], &meeting, &patient(30));
            world.insert(0, host.join().unwrap().remove(0));
            check_world(world);
        });
        let job = fresh_job();
        let meeting = Meeting::Unix { job: job.clone() };
        std::thread::scope(|scope| {
            let host = scope.spawn(|| connect(&ranks(3)[..1], &meeting, &patient(30)));
            let _open = strangers(|| Box::new(unix_meeting_point(&job)));
            let mut world = connect(&ranks(3)[1..], &meeting, &patient(30));
            world.insert(0, host.join().unwrap().remove(0));
            check_world(world);
        });
    });
}

/// Many more than are greeted at a time, none of which says a word or goes away.
#[test]
fn a_crowd_of_silent_strangers_changes_nothing() {
    watched(|| {
        let address = free_address();
        let meeting = tcp_meeting(&address, SECRET);
        let options = patient(20);
        std::thread::scope(|scope| {
            let host = scope.spawn(|| connect(&ranks(3)[..1], &meeting, &options));
            let _crowd: Vec<_> = (0..400).map(|_| tcp_stranger(&address)).collect();
            let begin = Instant::now();
            let mut world = connect(&ranks(3)[1..], &meeting, &options);
            assert!(begin.elapsed() < Duration::from_secs(10), "strangers held the ranks up");
            world.insert(0, host.join().unwrap().remove(0));
            check_world(world);
        });
    });
}

#[test]
fn strangers_at_the_mesh_change_nothing() {
    watched(|| {
        const SIZE: usize = 3;
        let addresses = Mutex::new(vec![None; SIZE]);
        let seeds = Mutex::new([[0; 32]; SIZE]);
        let (all_listen, strangers_in) = (Barrier::new(SIZE), Barrier::new(SIZE));
        let open = Mutex::new(Vec::new());
        let join = |rank: usize| {
            TcpTransport::connect_through(identity(rank, SIZE), &patient(30), |address, seed| {
                addresses.lock().unwrap()[rank] = Some(address);
                seeds.lock().unwrap()[rank] = seed;
                all_listen.wait();
                open.lock().unwrap().extend(strangers(|| Box::new(tcp_stranger(&address.to_string()))));
                strangers_in.wait();
                let all: Vec<SocketAddr> = addresses.lock().unwrap().iter().flatten().copied().collect();
                Ok((all, seeds.lock().unwrap()[0]))
            })
        };
        let world = std::thread::scope(|scope| {
            let join = &join;
            let threads: Vec<_> = (0..SIZE).map(|rank| scope.spawn(move || join(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        check_world(world);
    });
}

/// A man in the middle records how rank 1 proves itself, and plays it to rank 0 again.
#[test]
fn a_recorded_proof_opens_nothing() {
    watched(|| {
        let (real, relayed) = (free_address(), TcpListener::bind("127.0.0.1:0").unwrap());
        let relay_address = relayed.local_addr().unwrap().to_string();
        std::thread::scope(|scope| {
            let host = scope.spawn(|| connect(&ranks(2)[..1], &tcp_meeting(&real, SECRET), &patient(30)));
            let guest = scope.spawn(|| connect(&ranks(2)[1..], &tcp_meeting(&relay_address, SECRET), &patient(30)));
            // The first attempt: hear the proof, but keep it from rank 0.
            let (mut heard, mut asked) = (relayed.accept().unwrap().0, tcp_stranger(&real));
            let mut greeting = [0; 40];
            asked.read_exact(&mut greeting).unwrap();
            heard.write_all(&greeting).unwrap();
            let mut proof = [0; 84];
            heard.read_exact(&mut proof).unwrap();
            drop((heard, asked));
            // Play it on a new connection: rank 0 closes it and says nothing.
            let mut replay = tcp_stranger(&real);
            replay.read_exact(&mut greeting).unwrap();
            replay.write_all(&proof).unwrap();
            let mut answer = Vec::new();
            let _ = replay.read_to_end(&mut answer);
            assert_eq!(answer, [0; 32], "rank 0 answered a replay with more than a refusal");
            // The second attempt of rank 1 is let through, and the world forms.
            let (from, to) = (relayed.accept().unwrap().0, tcp_stranger(&real));
            relay(from, to);
            let mut world = host.join().unwrap();
            world.extend(guest.join().unwrap());
            check_world(world);
        });
    });
}

/// Passes bytes on in both directions, in the background.
fn relay(a: TcpStream, b: TcpStream) {
    for (mut from, mut to) in [(a.try_clone().unwrap(), b.try_clone().unwrap()), (b, a)] {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }
}
