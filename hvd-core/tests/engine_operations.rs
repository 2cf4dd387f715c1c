//! The operations of the engine, on ranks that are threads: what each gives for any world size, and in groups.

#[path = "support/ranks.rs"]
mod ranks;

use hvd_core::{Allreduce, Compression, Error, ReduceOp};
use proptest::prelude::*;
use ranks::{on_ranks, share, sum, tensor, value};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn alltoall_gives_each_rank_its_blocks(size in 1usize..=9, seed in any::<u32>(), largest in 0usize..3000) {
        let rows = |from: usize, to: usize| (from * 7919 + to * 104_729 + seed as usize) % (largest + 1);
        on_ranks(size, |world| {
            let rank = world.rank();
            let splits: Vec<usize> = (0..size).map(|to| rows(rank, to)).collect();
            let data: Vec<i32> = (0..size).flat_map(|to| vec![(rank * size + to) as i32; rows(rank, to)]).collect();
            for step in 0..2 {
                let (blocks, received) = world.alltoall("blocks", &data, Some(&splits))?;
                assert_eq!(received, (0..size).map(|from| rows(from, rank)).collect::<Vec<_>>(), "step {step}");
                let expected: Vec<i32> =
                    (0..size).flat_map(|from| vec![(from * size + rank) as i32; rows(from, rank)]).collect();
                assert_eq!(blocks, expected);
            }
            // The same name with other splits: nothing of that is remembered.
            let (blocks, received) = world.alltoall("blocks", &vec![rank as i32; 2 * size], None)?;
            assert_eq!(received, vec![2; size]);
            assert_eq!(blocks, (0..size).flat_map(|from| [from as i32; 2]).collect::<Vec<_>>());
            Ok(())
        });
    }

    #[test]
    fn reducescatter_gives_each_rank_its_share(
        size in 1usize..=9,
        rows in prop::sample::select(vec![0usize, 1, 2, 7, 100, 5003]),
        compression in prop::sample::select(vec![Compression::None, Compression::Bf16]),
    ) {
        on_ranks(size, |world| {
            let data = tensor(world.rank(), rows);
            let options = Allreduce::sum().compression(compression).prescale(0.5).postscale(4.0);
            let result = world.reducescatter("rows", &data, options)?;
            let expected: Vec<f64> = share(&sum(size, rows), world.rank(), size).iter().map(|x| 2.0 * x).collect();
            match compression {
                Compression::None => assert_eq!(result, expected),
                _ => result.iter().zip(&expected).for_each(|(x, y)| assert!((x - y).abs() <= 0.01 * 25.0 * size as f64)),
            }
            assert_eq!(result.len(), expected.len());
            let integers: Vec<i32> = data.iter().map(|&x| x as i32).collect();
            let largest = world.reducescatter("greatest", &integers, ReduceOp::Max)?;
            let expected: Vec<i32> =
                (0..rows).map(|at| (0..size).map(|rank| value(rank, at) as i32).max().unwrap_or(0)).collect();
            assert_eq!(largest, share(&expected, world.rank(), size));
            Ok(())
        });
    }

    /// One unit, of small and large tensors, empty ones among them.
    #[test]
    fn groups_give_what_their_tensors_give(
        size in 1usize..=6,
        lengths in prop::collection::vec(prop_oneof![0usize..50, 0usize..40_000], 1..6),
    ) {
        on_ranks(size, |world| {
            let rank = world.rank();
            for _ in 0..2 {
                let mut tensors: Vec<_> = lengths.iter().map(|&length| tensor(rank, length)).collect();
                let mut slices: Vec<_> = tensors.iter_mut().map(Vec::as_mut_slice).collect();
                world.grouped_allreduce("reduced", &mut slices, ReduceOp::Sum)?;
                for (tensor, &length) in tensors.iter().zip(&lengths) {
                    assert_eq!(*tensor, sum(size, length));
                }

                let tensors: Vec<_> = lengths.iter().map(|&length| tensor(rank, length + rank)).collect();
                let slices: Vec<_> = tensors.iter().map(Vec::as_slice).collect();
                let gathered = world.grouped_allgather("gathered", &slices)?;
                for (gathered, &length) in gathered.iter().zip(&lengths) {
                    assert_eq!(*gathered, (0..size).flat_map(|rank| tensor(rank, length + rank)).collect::<Vec<_>>());
                }

                let tensors: Vec<_> = lengths.iter().map(|&length| tensor(rank, length)).collect();
                let slices: Vec<_> = tensors.iter().map(Vec::as_slice).collect();
                let shares = world.grouped_reducescatter("scattered", &slices, ReduceOp::Sum)?;
                for (result, &length) in shares.iter().zip(&lengths) {
                    assert_eq!(*result, share(&sum(size, length), rank, size));
                }
            }
            Ok(())
        });
    }

    #[test]
    fn sparse_rows_add_up(size in 1usize..=5, seed in any::<u32>(), width in 0usize..4) {
        // Up to 6 rows on each rank, some of them twice, among 5 indices.
        let rows = |rank: usize| (rank + seed as usize) % 7;
        let index = |rank: usize, row: usize| ((rank * 3 + row * 5 + seed as usize) % 5) as i64 - 2;
        on_ranks(size, |world| {
            let rank = world.rank();
            let indices: Vec<_> = (0..rows(rank)).map(|row| index(rank, row)).collect();
            let values = tensor(rank, rows(rank) * width);
            for (op, divisor) in [(ReduceOp::Sum, 1.0), (ReduceOp::Average, size as f64)] {
                let (found, sums) = world.sparse_allreduce("sparse", &indices, &values, width, op)?;
                let mut expected = std::collections::BTreeMap::<i64, Vec<f64>>::new();
                for rank in 0..size {
                    for row in 0..rows(rank) {
                        let sums = expected.entry(index(rank, row)).or_insert_with(|| vec![0.0; width]);
                        sums.iter_mut().enumerate().for_each(|(at, sum)| *sum += value(rank, row * width + at));
                    }
                }
                assert_eq!(found, expected.keys().copied().collect::<Vec<_>>());
                let expected: Vec<f64> = expected.into_values().flatten().map(|sum| sum / divisor).collect();
                assert_eq!(sums.len(), expected.len());
                sums.iter().zip(&expected).for_each(|(x, y)| assert!((x - y).abs() < 1e-12, "{x} {y}"));
            }
            Ok(())
        });
    }
}

#[test]
fn large_blocks_of_an_alltoall_arrive() {
    on_ranks(3, |world| {
        let rows = |from: usize, to: usize| 300_000 * ((from + to) % 3);
        let splits: Vec<_> = (0..3).map(|to| rows(world.rank(), to)).collect();
        let data = vec![world.rank() as i64; splits.iter().sum()];
        let (blocks, received) = world.alltoall("large", &data, Some(&splits))?;
        assert_eq!(received, (0..3).map(|from| rows(from, world.rank())).collect::<Vec<_>>());
        assert!(blocks == (0..3).flat_map(|from| vec![from as i64; received[from]]).collect::<Vec<_>>());
        Ok(())
    });
}

#[test]
fn out_of_place_leaves_the_input() {
    on_ranks(3, |world| {
        let input = tensor(world.rank(), 70_000);
        let mut output = vec![0.0; 70_000];
        world.allreduce_into("apart", &input, &mut output, ReduceOp::Sum)?;
        assert_eq!(output, sum(3, 70_000));
        assert_eq!(input, tensor(world.rank(), 70_000));
        let short = world.allreduce_into("short", &input, &mut output[..3], ReduceOp::Sum);
        assert!(matches!(short, Err(Error::Invalid(text)) if text.contains("24 bytes")));
        Ok(())
    });
}

/// What the paper promises.
#[test]
fn adasum_of_equal_vectors_is_the_vector_and_of_orthogonal_ones_their_sum() {
    for size in 1..=8 {
        on_ranks(size, |world| {
            let same = tensor(0, 3000);
            let mut data = same.clone();
            world.allreduce("same", &mut data, ReduceOp::Adasum)?;
            data.iter().zip(&same).for_each(|(x, y)| assert!((x - y).abs() < 1e-9));
            let mut apart = vec![0.0f32; 64];
            apart[world.rank()] = 3.0;
            world.allreduce("apart", &mut apart, Allreduce::new(ReduceOp::Adasum).postscale(2.0))?;
            (0..64).for_each(|at| assert_eq!(apart[at], if at < size { 6.0 } else { 0.0 }));
            let mut nothing = [0.0f32; 8];
            world.allreduce("nothing", &mut nothing, ReduceOp::Adasum)?;
            assert_eq!(nothing, [0.0; 8]);
            Ok(())
        });
    }
}

#[test]
fn a_group_that_makes_no_sense_is_refused_at_once() {
    on_ranks(2, |world| {
        let empty = world.grouped_allgather::<f32>("none", &[]);
        assert!(matches!(empty, Err(Error::Invalid(text)) if text.contains("`none` is empty")));
        let splits = world.alltoall("splits", &[1.0f32], Some(&[1, 0, 0]));
        assert!(matches!(splits, Err(Error::Invalid(text)) if text.contains("3 splits for 2 ranks")));
        let adasum = world.reducescatter("adasum", &[1.0f32], ReduceOp::Adasum);
        assert!(matches!(adasum, Err(Error::Invalid(text)) if text.contains("whole tensors")));
        Ok(())
    });
}
