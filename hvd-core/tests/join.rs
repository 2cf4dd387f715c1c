//! Join: ranks that run out of data.

#[path = "support/ranks.rs"]
mod ranks;

use hvd_core::config::Config;
use hvd_core::{Allreduce, Compression, Error, ReduceOp};
use proptest::prelude::*;
use ranks::{on_ranks, on_ranks_with, share, sum, sum_over, tensor, value};

/// The ranks that still have data in a step, if rank `r` has `steps[r]` of them.
fn left(steps: &[usize], step: usize) -> Vec<usize> {
    (0..steps.len()).filter(|&rank| steps[rank] > step).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Each rank has its own number of steps, and every operation works for those that are left.
    #[test]
    fn uneven_steps(
        steps in prop::collection::vec(0usize..5, 1..6),
        cache_capacity in prop::sample::select(vec![0usize, 3, 1024]),
        elements in prop::sample::select(vec![5usize, 30_000]),
    ) {
        let size = steps.len();
        let config = Config { cache_capacity, ..Config::default() };
        let lasts = on_ranks_with(size, &config, |world| {
            let rank = world.rank();
            for step in 0..steps[rank] {
                let left = left(&steps, step);
                let count = left.len() as f64;
                let mut data = tensor(rank, elements);
                world.allreduce("sum", &mut data, ReduceOp::Sum)?;
                assert_eq!(data, sum_over(&left, elements));

                let mut data = tensor(rank, elements);
                world.allreduce("average", &mut data, ReduceOp::Average)?;
                data.iter().zip(sum_over(&left, elements)).for_each(|(x, y)| assert!((x - y / count).abs() < 1e-9));

                let mut data: Vec<i32> = tensor(rank, 40).iter().map(|&x| x as i32).collect();
                world.allreduce("floored", &mut data, ReduceOp::Average)?;
                let means = sum_over(&left, 40).into_iter().map(|sum| (sum / count).floor() as i32);
                assert_eq!(data, means.collect::<Vec<_>>());

                let mut data: Vec<f32> = tensor(rank, elements).iter().map(|&x| x as f32 - 20.0).collect();
                world.allreduce("greatest", &mut data, Allreduce::new(ReduceOp::Max).prescale(-1.0))?;
                let greatest = |at| left.iter().map(|&rank| 20.0 - value(rank, at) as f32).fold(f32::MIN, f32::max);
                assert_eq!(data, (0..elements).map(greatest).collect::<Vec<_>>());

                let mut data = vec![60_000.0f32; 10];
                world.allreduce("half", &mut data, Allreduce::average().compression(Compression::Fp16))?;
                data.iter().for_each(|x| assert!((x - 60_000.0).abs() < 64.0, "{x}"));

                // Row 0 of all but rank 0, which has none, and a row of its own of each.
                let rows: &[i64] = if rank == 0 { &[] } else { &[0, rank as i64] };
                let found = world.sparse_allreduce("rows", rows, &vec![6.0f32; rows.len()], 1, ReduceOp::Average)?;
                let others: Vec<_> = left.iter().copied().filter(|&rank| rank != 0).collect();
                let indices = others.first().map(|_| 0).into_iter().chain(others.iter().map(|&rank| rank as i64));
                assert_eq!(found.0, indices.collect::<Vec<_>>());
                let sums = others.first().map(|_| others.len()).into_iter().chain(others.iter().map(|_| 1));
                let means = sums.map(|ranks| 6.0 * ranks as f64 / count);
                found.1.iter().zip(means).for_each(|(&x, y)| assert!((f64::from(x) - y).abs() < 1e-5, "{x} {y}"));

                let gathered = world.allgather("gather", &tensor(rank, rank + 1))?;
                assert_eq!(gathered, left.iter().flat_map(|&rank| tensor(rank, rank + 1)).collect::<Vec<_>>());

                let (blocks, received) = world.alltoall("blocks", &vec![rank as u8; 2 * size], None)?;
                let rows = |from| if left.contains(&from) { 2 } else { 0 };
                assert_eq!(received, (0..size).map(rows).collect::<Vec<_>>());
                assert_eq!(blocks, left.iter().flat_map(|&from| [from as u8; 2]).collect::<Vec<_>>());

                let scattered = world.reducescatter("share", &tensor(rank, 31), ReduceOp::Sum)?;
                assert_eq!(scattered, share(&sum_over(&left, 31), rank, size));

                let mut data = tensor(rank, 20);
                world.broadcast("broadcast", &mut data, left[0])?;
                assert_eq!(data, tensor(left[0], 20));
                world.barrier()?;
            }
            let last = world.join()?;
            // All are back, whatever they have missed.
            world.barrier()?;
            let mut data = tensor(rank, 100);
            world.allreduce("sum", &mut data, ReduceOp::Sum)?;
            assert_eq!(data, sum(size, 100));
            assert_eq!(world.allgather("gather", &[rank as i32])?, (0..size as i32).collect::<Vec<_>>());
            Ok(last)
        });
        // One of those with the most steps, the same on all ranks.
        prop_assert_eq!(steps[lasts[0]], steps.iter().copied().max().unwrap_or(0));
        prop_assert!(lasts.iter().all(|last| *last == lasts[0]));
    }
}

#[test]
fn a_broadcast_from_a_rank_that_has_joined_is_an_error() {
    on_ranks(3, |world| {
        let mut data = [world.rank() as f32];
        world.broadcast("cached", &mut data, 1)?;
        if world.rank() == 1 {
            return world.join().map(drop);
        }
        // Until the others hear that rank 1 has joined they wait for it.
        for name in ["cached", "new"] {
            let result = world.broadcast(name, &mut data, 1);
            let text = "the root, rank 1, has joined";
            assert!(matches!(&result, Err(Error::Invalid(detail)) if detail.contains(text)), "{result:?}");
        }
        world.join().map(drop)
    });
}

#[test]
fn operations_before_a_join_still_count_and_those_after_it_are_refused() {
    on_ranks(2, |world| {
        if world.rank() == 0 {
            let early = world.allreduce_async("early", vec![1.0f32], ReduceOp::Average)?;
            let join = world.join_async()?;
            let late = world.allreduce("late", &mut [1.0f32], ReduceOp::Sum);
            assert!(matches!(&late, Err(Error::Invalid(text)) if text.contains("has joined")), "{late:?}");
            assert_eq!(early.wait()?, [2.0]);
            assert_eq!(join.wait()?, 1);
        } else {
            let mut data = [3.0f32];
            world.allreduce("early", &mut data, ReduceOp::Average)?;
            assert_eq!(data, [2.0]);
            let mut data = [5.0f32];
            world.allreduce("alone", &mut data, ReduceOp::Average)?;
            assert_eq!(data, [5.0]);
            assert_eq!(world.join()?, 1);
        }
        Ok(())
    });
}

#[test]
fn the_ranks_of_a_set_join_among_themselves() {
    on_ranks(4, |world| {
        let pair: &[usize] = if world.rank() < 2 { &[0, 1] } else { &[2, 3] };
        let set = world.process_set(pair)?.expect("a member");
        if world.rank() % 2 == 1 {
            let mut data = [7.0f64];
            set.allreduce("rest", &mut data, ReduceOp::Average)?;
            assert_eq!(data, if world.rank() == 1 { [7.0] } else { [3.5] });
        } else if world.rank() == 2 {
            set.allreduce("rest", &mut [0.0f64], ReduceOp::Average)?;
        }
        let last = set.join()?;
        assert!(pair.contains(&last));
        world.barrier()
    });
}
