//! Process sets: who is in them, what they do side by side, and what happens when the ranks disagree on them.

#[path = "support/ranks.rs"]
mod ranks;

use std::sync::Barrier;
use std::time::Duration;

use hvd_core::config::{Config, Stall};
use hvd_core::{Error, ProcessSet, ReduceOp, World};
use proptest::prelude::*;
use ranks::{Outcome, on_ranks, on_ranks_with, share, sum, sum_over, tensor};

/// Every operation of a set, checked.
fn exercise(set: &ProcessSet, label: &str) -> Outcome<()> {
    let (rank, size, members) = (set.rank(), set.size(), set.ranks().to_vec());
    let position = members.iter().position(|&member| member == rank).expect("a member");
    let mut data = tensor(rank, 3000);
    set.allreduce(&format!("{label} sum"), &mut data, ReduceOp::Sum)?;
    assert_eq!(data, sum_over(&members, 3000));
    let root = members[size - 1];
    let mut data = tensor(rank, 30);
    set.broadcast(&format!("{label} broadcast"), &mut data, root)?;
    assert_eq!(data, tensor(root, 30));
    let gathered = set.allgather(&format!("{label} gather"), &tensor(rank, rank))?;
    assert_eq!(gathered, members.iter().flat_map(|&rank| tensor(rank, rank)).collect::<Vec<_>>());
    let splits: Vec<_> = (0..size).map(|to| to + position).collect();
    let data: Vec<_> = splits.iter().flat_map(|&rows| vec![rank as i32; rows]).collect();
    let (blocks, received) = set.alltoall(&format!("{label} blocks"), &data, Some(&splits))?;
    assert_eq!(received, (0..size).map(|from| from + position).collect::<Vec<_>>());
    let expected = (0..size).flat_map(|from| vec![members[from] as i32; from + position]);
    assert_eq!(blocks, expected.collect::<Vec<_>>());
    let scattered = set.reducescatter(&format!("{label} share"), &tensor(rank, 31), ReduceOp::Sum)?;
    assert_eq!(scattered, share(&sum_over(&members, 31), position, size));
    let all: Vec<usize> = set.allgather_object(&format!("{label} objects"), &rank)?;
    assert_eq!(all, members);
    set.barrier()
}

#[test]
fn sets_are_made_by_their_members_alone_and_do_all_operations() {
    on_ranks(5, |world| {
        // Rank 4 calls nothing; its engine takes part in the background.
        let sets: &[&[usize]] = &[&[0, 2], &[3, 1], &[2, 1, 0, 3], &[2], &[1, 2, 3]];
        for (at, ranks) in sets.iter().enumerate().filter(|(_, ranks)| ranks.contains(&world.rank())) {
            let set = world.process_set(ranks)?.expect("a member");
            let mut sorted = ranks.to_vec();
            sorted.sort_unstable();
            assert_eq!((set.ranks(), set.size(), set.rank()), (&sorted[..], ranks.len(), world.rank()));
            exercise(&set, &format!("set {at}"))?;
        }
        assert!(world.process_set(&[(world.rank() + 1) % 5])?.is_none(), "not a member");
        exercise(world, "world")
    });
}

#[test]
fn a_set_that_waits_delays_no_other() {
    let gate = Barrier::new(2);
    on_ranks(4, |world| {
        let rank = world.rank();
        let slow = match rank {
            0 | 1 => world.process_set(&[0, 1])?,
            _ => None,
        };
        let pair: &[usize] = if rank < 2 { &[0, 1] } else { &[2, 3] };
        let fast = world.process_set(pair)?.expect("a member");
        // Rank 1 submits to the slow set only when rank 0 has come through all of the rest.
        let mut waiting = None;
        if let (Some(slow), 0) = (&slow, rank) {
            waiting = Some(slow.allreduce_async("slow", vec![1.0f32; 100_000], ReduceOp::Sum)?);
        }
        for step in 0..20 {
            exercise(&fast, &format!("fast {step}"))?;
            let mut data = tensor(rank, 500);
            world.allreduce(&format!("world {step}"), &mut data, ReduceOp::Sum)?;
            assert_eq!(data, sum(4, 500));
        }
        assert!(waiting.as_ref().is_none_or(|handle| !handle.poll()), "nobody else has submitted it");
        if let Some(slow) = &slow {
            gate.wait();
            let handle = match waiting {
                Some(handle) => handle,
                None => slow.allreduce_async("slow", vec![1.0f32; 100_000], ReduceOp::Sum)?,
            };
            assert_eq!(handle.wait()?, vec![2.0; 100_000]);
        }
        Ok(())
    });
}

#[test]
fn the_same_ranks_twice_are_two_sets() {
    on_ranks(3, |world| {
        let ranks = [0, 1, 2];
        let first = world.process_set(&ranks)?.expect("a member");
        let second = world.process_set(&ranks)?.expect("a member");
        // Each rank submits to the two in another order.
        let (one, two) = match world.rank() {
            1 => {
                let two = second.allreduce_async("b", vec![2.0f32], ReduceOp::Sum)?;
                (first.allreduce_async("a", vec![1.0f32], ReduceOp::Sum)?, two)
            }
            _ => {
                let one = first.allreduce_async("a", vec![1.0f32], ReduceOp::Sum)?;
                (one, second.allreduce_async("b", vec![2.0f32], ReduceOp::Sum)?)
            }
        };
        assert_eq!((one.wait()?, two.wait()?), (vec![3.0], vec![6.0]));
        first.remove()?;
        let late = first.barrier();
        assert!(matches!(&late, Err(Error::Invalid(text)) if text.contains("has been removed")), "{late:?}");
        let again = first.remove();
        assert!(matches!(&again, Err(Error::Invalid(text)) if text.contains("has been removed")), "{again:?}");
        exercise(&second, "second")
    });
}

#[test]
fn removal_ends_what_not_all_ranks_submitted() {
    on_ranks(2, |world| {
        let set = world.process_set(&[0, 1])?.expect("a member");
        let lonely = match world.rank() {
            0 => Some(set.allreduce_async("lonely", vec![1.0f32], ReduceOp::Sum)?),
            _ => None,
        };
        set.remove()?;
        if let Some(handle) = lonely {
            let result = handle.wait();
            assert!(matches!(result, Err(Error::ShutDown(_))), "{result:?}");
        }
        exercise(world, "world")
    });
}

#[test]
fn shutting_down_waits_for_what_sets_have_under_way() {
    for round in 0..10 {
        let results = World::threads(3, |world| {
            let set = world.process_set(&[0, 1, 2])?.expect("a member");
            let data = tensor(world.rank(), 20_000 + round);
            let handle = set.allreduce_async("last", data, ReduceOp::Sum)?;
            world.shutdown()?;
            handle.wait()
        });
        results.into_iter().for_each(|result| assert_eq!(result.expect("done"), sum(3, 20_000 + round)));
    }
}

#[test]
fn ranks_that_wait_in_different_sets_hear_of_it_and_go_on() {
    on_ranks(4, |world| {
        let ranks: &[usize] = match world.rank() {
            0 => &[0, 1],
            _ => &[0, 1, 2],
        };
        if world.rank() < 3 {
            match world.process_set(ranks) {
                Err(Error::Mismatch { detail, .. }) => {
                    let expected = "rank 0 makes the set [0, 1]; rank";
                    assert!(detail.starts_with(expected) && detail.ends_with("the set [0, 1, 2]"), "{detail}");
                }
                other => panic!("{other:?}"),
            }
        }
        world.barrier()?;
        if world.rank() < 3 {
            exercise(&world.process_set(&[0, 1, 2])?.expect("a member"), "at last")?;
        }
        Ok(())
    });
}

#[test]
fn ranks_that_are_none_are_refused() {
    on_ranks(2, |world| {
        for ranks in [&[][..], &[0, 0, 1], &[0, 2]] {
            let refused = world.process_set(ranks);
            assert!(matches!(&refused, Err(Error::Invalid(text)) if text.contains("world of 2")), "{refused:?}");
        }
        let set = world.process_set(&[0, 1])?.expect("a member");
        let alone = world.process_set(&[world.rank()])?.expect("a member");
        let root = alone.broadcast("root", &mut [1.0f32], 1 - world.rank());
        assert!(matches!(&root, Err(Error::Invalid(text)) if text.contains("none of the ranks")), "{root:?}");
        assert!(matches!(world.remove(), Err(Error::Invalid(_))));
        set.remove()
    });
}

#[test]
fn a_lost_rank_ends_the_operations_of_every_set() {
    let results = World::threads(3, |world| {
        let set = world.process_set(&[0, 1, 2])?.expect("a member");
        if world.rank() == 2 {
            return Ok(());
        }
        // The last of rank 2's values goes, and with it the world's connection.
        set.allreduce("data", &mut [1.0f32], ReduceOp::Sum)
    });
    for (rank, result) in results.into_iter().enumerate().take(2) {
        assert!(matches!(&result, Err(Error::PeerLost { rank: 2, .. })), "rank {rank}: {result:?}");
    }
}

/// Reduces `x` in one of two sets after the other, where this rank is a member.
fn reduce_in_both(sets: &[Option<ProcessSet>; 2], members: &[Vec<usize>; 2]) -> Outcome<()> {
    for (set, members) in sets.iter().zip(members) {
        if let Some(set) = set {
            let mut data = tensor(set.rank(), 10);
            set.allreduce("x", &mut data, ReduceOp::Sum)?;
            assert_eq!(data, sum_over(members, 10));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Ranks that are in two sets submit a tensor in one or the other, and the rest of both in theirs. All wait for each other,
    /// and all hear of it. So does it go with what was agreed on before, and they can go on.
    #[test]
    fn a_tensor_in_different_sets_is_an_error_on_every_rank(
        (size, masks) in (2usize..=6).prop_flat_map(|size| {
            let all = (1usize << size) - 1;
            (Just(size), [3..=all, 3..=all].prop_map(|masks| masks.map(|mask| mask | 3)))
        }),
        choices in prop::collection::vec(0usize..2, 6),
        cache_capacity in prop::sample::select(vec![0usize, 1024]),
    ) {
        let members = masks.map(|mask| (0..size).filter(|rank| mask >> rank & 1 == 1).collect::<Vec<_>>());
        let (warn_after, fail_after) = (Duration::from_millis(50), Duration::from_secs(60));
        let stall = Stall { disabled: false, warn_after, fail_after };
        let config = Config { cache_capacity, stall, ..Config::default() };
        on_ranks_with(size, &config, |world| {
            let rank = world.rank();
            let mut sets = [None, None];
            for (set, members) in sets.iter_mut().zip(&members).filter(|(_, members)| members.contains(&rank)) {
                *set = world.process_set(members)?;
            }
            for _ in 0..2 {
                reduce_in_both(&sets, &members)?;
                world.barrier()?;
                let choice = match (&sets, rank) {
                    ([Some(_), Some(_)], 0 | 1) => rank, // one of each at least
                    ([Some(_), Some(_)], _) => choices[rank],
                    ([Some(_), None], _) => 0,
                    _ => 1,
                };
                if let Some(set) = &sets[choice] {
                    let refused = set.allreduce("x", &mut tensor(rank, 10), ReduceOp::Sum);
                    let Err(Error::Mismatch { detail, .. }) = refused else { panic!("rank {rank}: {refused:?}") };
                    let other = format!(" sent it in the process set {:?}", members[1 - choice]);
                    assert!(detail.contains("sent allreduce(Sum)") && detail.contains(&other), "{detail}");
                }
                world.barrier()?;
            }
            reduce_in_both(&sets, &members)
        });
    }

    /// Overlapping sets, in flight at once, submitted by each rank in its own order.
    #[test]
    fn sets_in_flight_side_by_side(
        size in 2usize..=6,
        masks in prop::collection::vec(1usize..64, 1..5),
        elements in prop::sample::select(vec![1usize, 700, 30_000]),
        cache_capacity in prop::sample::select(vec![0usize, 2, 1024]),
    ) {
        let members = |mask: usize| (0..size).filter(|rank| mask >> rank & 1 == 1).collect::<Vec<_>>();
        let sets: Vec<_> = masks.iter().map(|&mask| members(mask)).filter(|set| !set.is_empty()).collect();
        let config = Config { cache_capacity, ..Config::default() };
        on_ranks_with(size, &config, |world| {
            let rank = world.rank();
            let mut own = Vec::new();
            for (at, ranks) in sets.iter().enumerate().filter(|(_, ranks)| ranks.contains(&rank)) {
                own.push((at, world.process_set(ranks)?.expect("a member")));
            }
            for step in 0..3 {
                let turn = (rank + step) % own.len().max(1);
                own.rotate_left(turn);
                let submit = |(at, set): &(usize, ProcessSet)| {
                    set.allreduce_async(&format!("tensor {at}"), tensor(rank, elements + at), ReduceOp::Sum)
                };
                let handles = own.iter().map(submit).collect::<Outcome<Vec<_>>>()?;
                let world_wide = world.allreduce_async("world", tensor(rank, elements), ReduceOp::Sum)?;
                for ((at, _), handle) in own.iter().zip(handles) {
                    assert_eq!(handle.wait()?, sum_over(&sets[*at], elements + at));
                }
                assert_eq!(world_wide.wait()?, sum(size, elements));
            }
            Ok(())
        });
    }
}
