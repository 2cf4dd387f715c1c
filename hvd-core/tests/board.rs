//! Rounds on the board of shared memory, and the engine that negotiates over it.

mod shm_support;
mod support;

use std::time::Duration;

use hvd_core::config::Config;
use hvd_core::shm::ShmBoard;
use hvd_core::{Error, ReduceOp, World};
use proptest::prelude::*;
use shm_support::{Member, in_group};
use support::watched;

/// What a rank says in a round: mostly little, now and then nothing, a full page, or more than a page.
fn speech(rank: usize, round: usize, lengths: &[usize]) -> Vec<u8> {
    let length = lengths[(rank * 7 + round * 3) % lengths.len()];
    (0..length).map(|at| (rank * 31 + round * 17 + at) as u8).collect()
}

/// Speaks and hears once, sleeping where nothing moves.
fn round(member: &mut Member, board: &mut ShmBoard, said: Vec<u8>) -> Vec<Option<Vec<u8>>> {
    let mut heard = vec![None; board.size()];
    heard[member.group.rank()] = Some(said.clone());
    board.say(&mut *member.transport, said).unwrap();
    member.until(|transport| {
        board.hear(transport, |peer, bytes| {
            assert!(heard[peer].replace(bytes.to_vec()).is_none(), "rank {peer} was heard twice");
            Ok(())
        })
    });
    heard
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everybody_hears_everybody_in_every_round(
        ranks in 1..=9usize,
        lengths in prop::collection::vec(prop_oneof![0..64usize, 4080..4100usize, Just(10_000)], 1..8),
        spins in prop::sample::select(vec![0, 20]),
    ) {
        watched(move || {
            in_group(ranks, 4096, |member| {
                member.spins = spins;
                let mut board = ShmBoard::new(member.group.clone());
                for turn in 0..12 {
                    let said = speech(member.group.rank(), turn, &lengths);
                    let heard = round(member, &mut board, said);
                    let expected: Vec<_> = (0..ranks).map(|rank| Some(speech(rank, turn, &lengths))).collect();
                    assert_eq!(heard, expected);
                }
                assert!(member.longest_nap < Duration::from_secs(4), "a wake-up was lost");
            });
        });
    }

    #[test]
    fn tensors_submitted_in_any_order_are_all_reduced(
        ranks in 2..=6usize,
        orders in prop::collection::vec(Just((0..24usize).collect::<Vec<_>>()).prop_shuffle(), 6),
        cache_capacity in prop::sample::select(vec![0, 5, 1024]),
        spin_us in prop::sample::select(vec![0, 50]),
    ) {
        let config = Config { cache_capacity, spin: Duration::from_micros(spin_us), ..Config::default() };
        watched(move || {
            let results = World::threads_sharing(ranks, &config, |world| {
                for step in 0..4 {
                    let order = &orders[(world.rank() + step) % orders.len()];
                    let submit = |&tensor: &usize| {
                        let data = vec![(world.rank() + tensor + step) as i64; 1 + 700 * tensor];
                        Ok((tensor, world.allreduce_async(&format!("tensor {tensor}"), data, ReduceOp::Sum)?))
                    };
                    let handles = order.iter().map(submit).collect::<Result<Vec<_>, Error>>()?;
                    for (tensor, handle) in handles {
                        let sum: i64 = (0..ranks).map(|rank| (rank + tensor + step) as i64).sum();
                        assert_eq!(handle.wait()?, vec![sum; 1 + 700 * tensor]);
                    }
                }
                world.shutdown()
            });
            results.into_iter().for_each(|result: Result<(), Error>| result.expect("a rank failed"));
        });
    }
}

#[test]
fn names_too_long_for_the_board_are_agreed_on_by_messages() {
    watched(|| {
        let results = World::threads_sharing(3, &Config::default(), |world| {
            for length in [10, 5000, 300_000] {
                let mut data = vec![1.0f32; 100];
                world.allreduce(&"n".repeat(length), &mut data, ReduceOp::Sum)?;
                assert_eq!(data, [3.0; 100]);
            }
            world.shutdown()
        });
        results.into_iter().for_each(|result: Result<(), Error>| result.expect("a rank failed"));
    });
}

#[test]
fn a_rank_that_is_long_silent_delays_the_others_and_nothing_is_lost() {
    watched(|| {
        let results = World::threads_sharing(4, &Config::default(), |world| {
            for turn in 0..200 {
                // The others begin the round, spin, fall asleep and call this rank, which has nothing to say.
                if turn % 4 == world.rank() {
                    std::thread::sleep(Duration::from_micros(300));
                }
                let mut data = [1i32; 10];
                world.allreduce("x", &mut data, ReduceOp::Sum)?;
                assert_eq!(data, [4; 10]);
            }
            world.shutdown()
        });
        results.into_iter().for_each(|result: Result<(), Error>| result.expect("a rank failed"));
    });
}

#[test]
fn a_rank_lost_in_the_middle_of_a_round_is_an_error_that_names_it() {
    watched(|| {
        let results = World::threads_sharing(3, &Config::default(), |world| {
            let mut data = [1.0f32; 10];
            world.allreduce("x", &mut data, ReduceOp::Sum)?;
            if world.rank() == 1 {
                world.abort("it was told to");
                return Ok(());
            }
            world.allreduce("x", &mut data, ReduceOp::Sum)
        });
        for rank in [0, 2] {
            assert!(matches!(results[rank], Err(Error::PeerLost { rank: 1, .. })), "{:?}", results[rank]);
        }
    });
}
