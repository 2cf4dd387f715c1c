//! Peers that are silent: cut off by a relay that stops to pass bytes on, or just busy.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use hvd_core::Error;
use hvd_core::transport::tcp::{TcpOptions, TcpTransport};
use support::*;

/// Short, but long enough for a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(2);

fn options(peer_timeout: Duration) -> TcpOptions {
    TcpOptions { peer_timeout, ..TcpOptions::default() }
}

/// The network between the last rank and the others.
#[derive(Clone, Default)]
struct Wire {
    cut: Arc<AtomicBool>,
}

impl Wire {
    /// An address from which connections go on to `target`.
    fn relay_to(&self, target: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let wire = self.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let far = TcpStream::connect(target).unwrap();
                for (from, to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    let wire = wire.clone();
                    std::thread::spawn(move || wire.carry(from, to));
                }
            }
        });
        address
    }

    /// Passes bytes on; those that come while the wire is cut wait.
    fn carry(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            while self.cut.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    }
}

/// A world whose last rank reaches the others over `wire` only.
fn world(size: usize, wire: &Wire, options: &TcpOptions) -> Vec<Rank> {
    world_over(size, &vec![wire.clone(); size], options)
}

/// A world whose last rank reaches each other one over a wire of its own.
fn world_over(size: usize, wires: &[Wire], options: &TcpOptions) -> Vec<Rank> {
    let addresses = Mutex::new(vec![None; size]);
    let seeds = Mutex::new([[0; 32]; 16]);
    let all_listen = Barrier::new(size);
    connect_all(size, |rank| {
        TcpTransport::connect_through(identity(rank, size), options, |address, seed| {
            addresses.lock().unwrap()[rank] = Some(address);
            seeds.lock().unwrap()[rank] = seed;
            all_listen.wait();
            let direct = addresses.lock().unwrap().clone().into_iter().flatten().zip(wires);
            let seen = |(address, wire): (_, &Wire)| if rank + 1 == size { wire.relay_to(address) } else { address };
            Ok((direct.map(seen).collect(), seeds.lock().unwrap()[0]))
        })
        .expect("a rank cannot connect")
    })
}

#[test]
fn who_is_cut_off_is_named_by_all_others() {
    watched(|| {
        for size in [2, 3, 5] {
            let wire = Wire::default();
            let ranks = world(size, &wire, &options(TIMEOUT));
            wire.cut.store(true, Ordering::Release);
            let begin = Instant::now();
            let errors = on_each(ranks, |mut rank| failure(&mut *rank));
            assert!(begin.elapsed() < 5 * TIMEOUT, "it took {:?}", begin.elapsed());
            for (rank, error) in errors.into_iter().enumerate() {
                let Error::PeerLost { rank: lost, cause } = error else { panic!("{error}") };
                assert_eq!(lost == size - 1, rank != size - 1, "rank {rank} names rank {lost}: {cause}");
                assert!(cause.contains("no sign of life for 2 s") || cause.contains("connection lost"), "{cause}");
            }
            wire.cut.store(false, Ordering::Release);
        }
    });
}

#[test]
fn who_does_not_touch_its_transport_for_long_is_not_lost() {
    watched(|| {
        let ranks = world(3, &Wire::default(), &options(TIMEOUT));
        on_each(ranks, |mut rank| {
            if rank.rank() == 1 {
                std::thread::sleep(2 * TIMEOUT); // It computes.
                for peer in [0, 2] {
                    rank.send(peer, tag(0), memory(&[7])).unwrap();
                }
            } else {
                assert_eq!(receive_any(&mut *rank, 1, tag(0)).unwrap(), [7]);
            }
            close(rank);
        });
    });
}

#[test]
fn without_a_timeout_any_silence_is_borne() {
    watched(|| {
        let wire = Wire::default();
        let ranks = world(2, &wire, &options(Duration::ZERO));
        wire.cut.store(true, Ordering::Release);
        on_each(ranks, |mut rank| {
            if rank.rank() == 0 {
                rank.send(1, tag(0), memory(&[7])).unwrap();
                std::thread::sleep(TIMEOUT); // The pause of a debugger.
                wire.cut.store(false, Ordering::Release);
            } else {
                assert_eq!(receive_any(&mut *rank, 0, tag(0)).unwrap(), [7]);
            }
            close(rank);
        });
    });
}

/// The neighbours of a rank that is stopped amid its goodbyes may have heard theirs and be gone.
#[test]
fn a_goodbye_that_never_comes_is_missed() {
    watched(|| {
        let mut ranks = world(2, &Wire::default(), &options(TIMEOUT));
        let _silent = ranks.pop();
        let mut rank = ranks.remove(0);
        let error = until(&mut *rank, |rank| Ok(rank.close()?.then_some(()))).expect_err("rank 1 says no goodbye");
        let Error::PeerLost { rank: 1, cause } = error else { panic!("{error}") };
        assert!(cause.contains("did not say goodbye within 2 s"), "{cause}");
    });
}

/// It dies, or is cut off, between two of its goodbyes: who has heard one parts in peace, who has not names it.
#[test]
fn a_goodbye_that_reaches_some_ranks_only() {
    watched(|| {
        // The last rank's neighbours are 0 and 2; that rank 1 is cut off from it, no heart beat tells.
        for deaf in [0, 1] {
            let wires: Vec<_> = (0..4).map(|_| Wire::default()).collect();
            let ranks = world_over(4, &wires, &options(TIMEOUT));
            wires[deaf].cut.store(true, Ordering::Release);
            let ends = on_each(ranks, |mut rank| until(&mut *rank, |rank| Ok(rank.close()?.then_some(()))));
            wires[deaf].cut.store(false, Ordering::Release);
            for (rank, end) in ends.into_iter().enumerate() {
                let expected = if rank == deaf {
                    Some(3)
                } else if rank == 3 {
                    Some(deaf)
                } else {
                    None
                };
                let lost = end.err().map(|error| match error {
                    Error::PeerLost { rank, .. } => rank,
                    error => panic!("{error}"),
                });
                assert_eq!(lost, expected, "rank {rank}, where rank {deaf} heard no goodbye");
            }
        }
    });
}

/// Rank 1 knows that all shut down, and the others wait for word of it from the last rank, which is silent from then on.
#[test]
fn who_waits_for_a_silent_rank_is_not_blamed_for_its_missing_goodbye() {
    watched(|| {
        let (wire, timeout) = (Wire::default(), 2 * TIMEOUT); // There is half of it to spare.
        let ranks = world(4, &wire, &options(timeout));
        let ends = on_each(ranks, |mut rank| match rank.rank() {
            1 => until(&mut *rank, |rank| Ok(rank.close()?.then_some(()))).expect_err("nobody else says goodbye"),
            3 => {
                // Rank 1 has begun to wait by now, and heartbeats have come since. If it has not, the test shows less.
                std::thread::sleep(timeout / 3);
                wire.cut.store(true, Ordering::Release);
                failure(&mut *rank)
            }
            _ => failure(&mut *rank),
        });
        wire.cut.store(false, Ordering::Release);
        for (rank, error) in ends.into_iter().enumerate().filter(|(rank, _)| *rank != 3) {
            assert!(matches!(error, Error::PeerLost { rank: 3, .. }), "rank {rank}: {error}");
        }
    });
}
