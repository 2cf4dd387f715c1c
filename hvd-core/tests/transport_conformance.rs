//! What every transport promises, run on each that can live on threads.

mod support;

use std::time::Duration;

use hvd_core::Error;
use hvd_core::Memory;
use hvd_core::transport::tcp::{Meeting, TcpOptions, TcpTransport};
use hvd_core::transport::thread::{Delays, ThreadTransport};
use support::*;

fn thread_world(size: usize) -> Vec<Rank> {
    ThreadTransport::world(size).into_iter().map(|rank| Box::new(rank) as Rank).collect()
}

fn delayed_world(size: usize) -> Vec<Rank> {
    let delays = Delays { seed: 42, max_polls: 9 };
    ThreadTransport::world_with_delays(size, delays).into_iter().map(|rank| Box::new(rank) as Rank).collect()
}

fn tcp_world(size: usize) -> Vec<Rank> {
    let meeting = Meeting::Unix { job: fresh_job() };
    connect_all(size, |rank| TcpTransport::connect(identity(rank, size), &meeting, &TcpOptions::default()).unwrap())
}

/// The tests below, for one kind of world.
macro_rules! conformance {
    ($name:ident, $world:expr) => {
        mod $name {
            use super::*;
            conformance!(@tests $world, knows_who_it_is, keeps_the_order_of_a_tag, keeps_messages_that_nobody_waits_for,
                keeps_tags_apart, moves_empty_messages, moves_large_messages_both_ways, adopts_a_message_half_way,
                sends_to_itself,
                wakes_a_sleeper_by_a_ring, wakes_a_sleeper_from_the_same_process, reports_a_rank_that_was_dropped,
                names_the_cause_of_an_abort, names_the_first_victim_to_bystanders, refuses_a_wrong_length,
                reports_a_message_that_will_never_come, refuses_a_peer_that_does_not_exist, closes_with_sends_under_way);
        }
    };
    (@tests $world:expr, $($test:ident),*) => {
        $(#[test] fn $test() { watched(|| super::$test($world)); })*
    };
}

conformance!(thread, thread_world);
conformance!(delayed_thread, delayed_world);
conformance!(tcp, tcp_world);

fn knows_who_it_is(world: fn(usize) -> Vec<Rank>) {
    for size in [1, 2, 5] {
        let who = on_each(world(size), |rank| {
            let who = (rank.rank(), rank.size());
            close(rank);
            who
        });
        assert_eq!(who, (0..size).map(|rank| (rank, size)).collect::<Vec<_>>());
    }
}

fn keeps_the_order_of_a_tag(world: fn(usize) -> Vec<Rank>) {
    on_each(world(3), |mut rank| {
        let (me, size) = (rank.rank(), rank.size());
        let mut requests = Vec::new();
        let mut received = Vec::new();
        for peer in (0..size).filter(|peer| *peer != me) {
            for index in 0..100u32 {
                requests.push(rank.send(peer, tag(0), Memory::from_vec(vec![index as i32, me as i32])).unwrap());
                let into = Memory::zeroed(8);
                requests.push(rank.recv(peer, tag(0), into.clone()).unwrap());
                received.push((peer, index, into));
            }
        }
        wait_all(&mut *rank, requests).unwrap();
        for (peer, index, into) in received {
            let expected = Memory::from_vec(vec![index as i32, peer as i32]);
            assert_eq!(bytes(&into), bytes(&expected));
        }
        close(rank);
    });
}

fn keeps_messages_that_nobody_waits_for(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |mut rank| {
        let peer = 1 - rank.rank();
        let sends: Vec<_> = (1..=50usize)
            .map(|length| rank.send(peer, tag(1), memory(&vec![length as u8; length * 500])).unwrap())
            .collect();
        // The message of another tag comes last, so all others must be there by then.
        let last = rank.send(peer, tag(2), memory(b"last")).unwrap();
        assert_eq!(receive_any(&mut *rank, peer, tag(2)).unwrap(), b"last");
        for length in 1..=50usize {
            let into = Memory::zeroed(length * 500);
            let request = rank.recv(peer, tag(1), into.clone()).unwrap();
            wait(&mut *rank, request).unwrap();
            assert_eq!(bytes(&into), vec![length as u8; length * 500]);
        }
        wait_all(&mut *rank, sends.into_iter().chain([last])).unwrap();
        close(rank);
    });
}

fn keeps_tags_apart(world: fn(usize) -> Vec<Rank>) {
    on_each(world(4), |mut rank| {
        let (me, size) = (rank.rank(), rank.size());
        let mut requests = Vec::new();
        let mut received = Vec::new();
        for sequence in 0..64 {
            for peer in 0..size {
                let text = format!("{me} to {peer} on {sequence}");
                requests.push(rank.send(peer, tag(sequence), memory(text.as_bytes())).unwrap());
            }
        }
        for sequence in (0..64).rev() {
            for peer in 0..size {
                let text = format!("{peer} to {me} on {sequence}");
                let into = Memory::zeroed(text.len());
                requests.push(rank.recv(peer, tag(sequence), into.clone()).unwrap());
                received.push((text, into));
            }
        }
        wait_all(&mut *rank, requests).unwrap();
        received.iter().for_each(|(text, into)| assert_eq!(bytes(into), text.as_bytes()));
        close(rank);
    });
}

fn moves_empty_messages(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |mut rank| {
        let peer = 1 - rank.rank();
        let sends = [0, 1, 1].map(|t| rank.send(peer, tag(t), Memory::empty()).unwrap());
        let recv = rank.recv(peer, tag(0), Memory::empty()).unwrap();
        wait_all(&mut *rank, sends.into_iter().chain([recv])).unwrap();
        assert_eq!(receive_any(&mut *rank, peer, tag(1)).unwrap(), b"");
        assert_eq!(receive_any(&mut *rank, peer, tag(1)).unwrap(), b"");
        assert!(rank.try_recv_any(peer, tag(1)).unwrap().is_none());
        close(rank);
    });
}

fn moves_large_messages_both_ways(world: fn(usize) -> Vec<Rank>) {
    const WORDS: usize = 8 << 20;
    on_each(world(2), |mut rank| {
        let (me, peer) = (rank.rank() as i64, 1 - rank.rank());
        let data = Memory::from_vec((0..WORDS as i64).map(|i| i * 3 + me).collect());
        let into = Memory::zeroed(WORDS * 8);
        let requests = [rank.send(peer, tag(0), data).unwrap(), rank.recv(peer, tag(0), into.clone()).unwrap()];
        wait_all(&mut *rank, requests).unwrap();
        let expected = Memory::from_vec((0..WORDS as i64).map(|i| i * 3 + 1 - me).collect());
        assert!(bytes(&into) == bytes(&expected));
        close(rank);
    });
}

/// The receive is posted while its message is on the way, or after it.
fn adopts_a_message_half_way(world: fn(usize) -> Vec<Rank>) {
    const BYTES: usize = 32 << 20;
    on_each(world(2), |mut rank| {
        let peer = 1 - rank.rank();
        let sends = [1, 2].map(|fill| rank.send(peer, tag(0), memory(&vec![fill; BYTES])).unwrap());
        for _ in 0..20 {
            rank.progress().unwrap();
        }
        for fill in [1, 2] {
            let into = Memory::zeroed(BYTES);
            let request = rank.recv(peer, tag(0), into.clone()).unwrap();
            wait(&mut *rank, request).unwrap();
            assert!(bytes(&into).iter().all(|byte| *byte == fill));
        }
        wait_all(&mut *rank, sends).unwrap();
        close(rank);
    });
}

fn sends_to_itself(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |mut rank| {
        let me = rank.rank();
        for length in [3, 100_000] {
            let into = Memory::zeroed(length);
            let early = rank.recv(me, tag(0), into.clone()).unwrap();
            let sends = [0, 1].map(|t| rank.send(me, tag(t), memory(&vec![9; length])).unwrap());
            wait_all(&mut *rank, sends.into_iter().chain([early])).unwrap();
            assert_eq!(bytes(&into), vec![9; length]);
            assert_eq!(receive_any(&mut *rank, me, tag(1)).unwrap(), vec![9; length]);
        }
        close(rank);
    });
}

fn wakes_a_sleeper_by_a_ring(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |mut rank| {
        // Each ring answers the one before, so none can be merged with another; a lost one hangs.
        let turns = std::sync::atomic::AtomicU32::new(0);
        if rank.rank() == 0 {
            let waiter = rank.waiter();
            // Rank 1 rings until it is told that its ring was felt: sleep without any limit until then.
            rank.progress().unwrap();
            waiter.wait(None);
            turns.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let done = rank.send(1, tag(0), memory(b"felt")).unwrap();
            wait(&mut *rank, done).unwrap();
        } else {
            rank.ring(0).unwrap();
            assert_eq!(receive_any(&mut *rank, 0, tag(0)).unwrap(), b"felt");
        }
        close(rank);
    });
}

fn wakes_a_sleeper_from_the_same_process(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |rank| {
        let waiter = rank.waiter();
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| waiter.wait(None));
            rank.waiter().wake();
            sleeper.join().unwrap();
        });
        waiter.wake();
        waiter.wait(None); // A wake-up before the sleep is not lost.
        close(rank);
    });
}

fn reports_a_rank_that_was_dropped(world: fn(usize) -> Vec<Rank>) {
    let errors = on_each(world(3), |mut rank| {
        if rank.rank() == 1 {
            return None;
        }
        let error = match rank.recv(1, tag(0), Memory::zeroed(4)) {
            Ok(request) => wait(&mut *rank, request).unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(rank.progress().unwrap_err().to_string(), error.to_string(), "the error stays");
        Some(error)
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error}");
    }
}

fn names_the_cause_of_an_abort(world: fn(usize) -> Vec<Rank>) {
    let errors = on_each(world(4), |mut rank| {
        if rank.rank() == 2 {
            rank.abort(&Error::ShutDown("out of cheese".into()));
            return rank.progress().unwrap_err();
        }
        failure(&mut *rank)
    });
    for (rank, error) in errors.into_iter().enumerate().filter(|(rank, _)| *rank != 2) {
        let Error::PeerLost { rank: 2, cause } = &error else { panic!("rank {rank} got {error}") };
        assert!(cause.contains("out of cheese"), "rank {rank} got {error}");
    }
}

/// Rank 3 aborts; 1 notices and leaves at once; the others must still name rank 3, again and again.
fn names_the_first_victim_to_bystanders(world: fn(usize) -> Vec<Rank>) {
    for _ in 0..20 {
        let errors = on_each(world(4), |mut rank| match rank.rank() {
            3 => {
                rank.abort(&Error::ShutDown("first".into()));
                None
            }
            _ => Some(failure(&mut *rank)),
        });
        for error in errors.into_iter().flatten() {
            assert!(matches!(&error, Error::PeerLost { rank: 3, cause } if cause.contains("first")), "{error}");
        }
    }
}

fn refuses_a_wrong_length(world: fn(usize) -> Vec<Rank>) {
    let errors = on_each(world(2), |mut rank| {
        if rank.rank() == 0 {
            let _ = rank.send(1, tag(0), memory(&[1; 12]));
        } else if let Err(error) = rank.recv(0, tag(0), Memory::zeroed(8)) {
            return error;
        }
        failure(&mut *rank)
    });
    assert!(matches!(errors[1], Error::Protocol { .. }), "{}", errors[1]);
    assert!(errors[1].to_string().contains("12 bytes"), "{}", errors[1]);
    assert!(matches!(&errors[0], Error::PeerLost { rank: 1, cause } if cause.contains("12 bytes")), "{}", errors[0]);
}

fn reports_a_message_that_will_never_come(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |mut rank| {
        if rank.rank() == 0 {
            let error = match rank.recv(1, tag(0), Memory::zeroed(8)) {
                Ok(request) => wait(&mut *rank, request).unwrap_err(),
                Err(error) => error,
            };
            assert!(matches!(&error, Error::PeerLost { rank: 1, .. }), "{error}");
        } else {
            // Rank 0 never says goodbye, it fails: that is this rank's way out.
            let _ = until(&mut *rank, |rank| Ok(rank.close()?.then_some(())));
        }
    });
}

fn refuses_a_peer_that_does_not_exist(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |mut rank| {
        assert!(matches!(rank.send(2, tag(0), Memory::empty()), Err(Error::Invalid(_))));
        assert!(matches!(rank.recv(9, tag(0), Memory::empty()), Err(Error::Invalid(_))));
        close(rank);
    });
}

/// A rank that closes has all its messages delivered, though nobody tests its sends.
fn closes_with_sends_under_way(world: fn(usize) -> Vec<Rank>) {
    on_each(world(2), |mut rank| {
        if rank.rank() == 0 {
            rank.send(1, tag(0), memory(&vec![5; 20 << 20])).unwrap();
        } else {
            let into = Memory::zeroed(20 << 20);
            let request = rank.recv(0, tag(0), into.clone()).unwrap();
            wait(&mut *rank, request).unwrap();
            assert!(bytes(&into).iter().all(|byte| *byte == 5));
        }
        rank.waiter().wait(Some(Duration::ZERO));
        close(rank);
    });
}

#[test]
#[ignore = "needs 5 GB of memory"]
fn tcp_moves_more_than_2_gib_at_once() {
    const WORDS: usize = (1 << 28) + 3;
    watched(|| {
        on_each(tcp_world(2), |mut rank| {
            let request = match rank.rank() {
                0 => rank.send(1, tag(0), Memory::from_vec((0..WORDS as i64).collect())).unwrap(),
                _ => {
                    let into = Memory::zeroed(WORDS * 8);
                    let request = rank.recv(0, tag(0), into.clone()).unwrap();
                    wait(&mut *rank, request).unwrap();
                    // SAFETY: the request is complete.
                    assert!(unsafe { into.into_vec::<i64>() }.into_iter().eq(0..WORDS as i64));
                    return close(rank);
                }
            };
            wait(&mut *rank, request).unwrap();
            close(rank);
        });
    });
}
