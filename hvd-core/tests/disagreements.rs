//! Ranks that submit different things under one name: all of them hear which rank sent what, and go on.

#[path = "support/ranks.rs"]
mod ranks;

use hvd_core::{Allreduce, Compression, DType, Device, Error, Memory, OpKind, Output, ReduceOp, Submission, World};
use ranks::{Outcome, on_ranks};

/// An operation on zeros.
fn operation(kind: OpKind, dtype: DType, shape: &[usize]) -> Submission {
    let bytes = shape.iter().product::<usize>() * dtype.size();
    let output = match kind {
        OpKind::Allgather | OpKind::Alltoall { .. } | OpKind::Reducescatter(_) => {
            Output::Allocate(Box::new(Memory::zeroed))
        }
        _ => Output::InPlace,
    };
    Submission::new("odd", kind, dtype, shape.to_vec(), Memory::zeroed(bytes), output)
}

fn sum() -> OpKind {
    OpKind::Allreduce(Allreduce::sum())
}

fn alltoall(splits: Option<&[usize]>) -> OpKind {
    OpKind::Alltoall { splits: splits.map(<[usize]>::to_vec) }
}

/// What most ranks submit, and what rank 1 submits, as the error tells of it.
type Case = (&'static str, fn() -> Submission, &'static str, fn() -> Submission, &'static str);

const CASES: &[Case] = &[
    (
        "shape",
        || operation(sum(), DType::F32, &[4]),
        "allreduce(Sum) of f32 [4]",
        || operation(sum(), DType::F32, &[2, 2]),
        "allreduce(Sum) of f32 [2, 2]",
    ),
    (
        "dtype",
        || operation(sum(), DType::F32, &[4]),
        "allreduce(Sum) of f32 [4]",
        || operation(sum(), DType::F64, &[4]),
        "allreduce(Sum) of f64 [4]",
    ),
    (
        "op",
        || operation(sum(), DType::F32, &[4]),
        "allreduce(Sum) of f32 [4]",
        || operation(OpKind::Allreduce(ReduceOp::Adasum.into()), DType::F32, &[4]),
        "allreduce(Adasum) of f32 [4]",
    ),
    (
        "scale factors",
        || operation(sum(), DType::F32, &[4]),
        "allreduce(Sum) of f32 [4]",
        || operation(OpKind::Allreduce(Allreduce::sum().postscale(2.0)), DType::F32, &[4]),
        "allreduce(Sum, prescale 1, postscale 2) of f32 [4]",
    ),
    (
        "compression",
        || operation(sum(), DType::F32, &[4]),
        "allreduce(Sum) of f32 [4]",
        || operation(OpKind::Allreduce(Allreduce::sum().compression(Compression::Bf16)), DType::F32, &[4]),
        "allreduce(Sum, compression Bf16) of f32 [4]",
    ),
    (
        "kind",
        || operation(sum(), DType::F32, &[4]),
        "allreduce(Sum) of f32 [4]",
        || operation(OpKind::Reducescatter(Allreduce::sum()), DType::F32, &[4]),
        "reducescatter(Sum) of f32 [4]",
    ),
    (
        "kind without elements",
        || operation(OpKind::Barrier, DType::U8, &[0]),
        "barrier",
        || operation(OpKind::Allgather, DType::F32, &[4]),
        "allgather of f32 rows of []",
    ),
    (
        "root",
        || operation(OpKind::Broadcast { root: 0 }, DType::I32, &[4]),
        "broadcast(root 0) of i32 [4]",
        || operation(OpKind::Broadcast { root: 2 }, DType::I32, &[4]),
        "broadcast(root 2) of i32 [4]",
    ),
    (
        "rows",
        || operation(OpKind::Allgather, DType::U8, &[4, 3]),
        "allgather of u8 rows of [3]",
        || operation(OpKind::Allgather, DType::U8, &[4, 2]),
        "allgather of u8 rows of [2]",
    ),
    (
        "splits",
        || operation(alltoall(None), DType::F32, &[6]),
        "alltoall of f32 rows of []",
        || operation(alltoall(Some(&[1, 2, 2])), DType::F32, &[6]),
        "alltoall(splits [1, 2, 2], which are not its 6 rows) of f32 rows of []",
    ),
    (
        "rows that cannot be split",
        || operation(alltoall(Some(&[1, 2, 3])), DType::F32, &[6]),
        "alltoall of f32 rows of []",
        || operation(alltoall(None), DType::F32, &[5]),
        "alltoall(no splits, and 5 rows, which cannot be split equally) of f32 rows of []",
    ),
    (
        "device",
        || operation(sum(), DType::F32, &[4]),
        "allreduce(Sum) of f32 [4]",
        || Submission { device: Device::Cuda, ..operation(sum(), DType::F32, &[4]) },
        "allreduce(Sum) of f32 [4] on cuda",
    ),
];

/// The world and its sets still work.
fn works(world: &World) -> Outcome<()> {
    let mut data = [world.rank() as f32];
    world.allreduce("fine", &mut data, ReduceOp::Sum)?;
    assert_eq!(data, [3.0]);
    Ok(())
}

#[test]
fn every_rank_hears_which_rank_sent_what() {
    on_ranks(3, |world| {
        for (what, usual, told, odd, told_of_odd) in CASES {
            // Agreed on before, so that the disagreement must get past the cache.
            world.submit(usual())?.wait()?;
            let submission = if world.rank() == 1 { odd() } else { usual() };
            match world.submit(submission)?.wait() {
                Err(Error::Mismatch { name, detail }) => {
                    assert_eq!(name, "odd");
                    assert_eq!(detail, format!("ranks 0, 2 sent {told}; rank 1 sent {told_of_odd}"), "{what}");
                }
                other => panic!("{what}: expected a mismatch, got {other:?}"),
            }
            works(world)?;
        }
        Ok(())
    });
}

#[test]
fn what_all_agree_on_and_none_can_do_is_refused_on_all() {
    on_ranks(3, |world| {
        let unfit = operation(alltoall(Some(&[1, 2, 2])), DType::F32, &[6]);
        let elsewhere = Submission { device: Device::Cuda, ..operation(sum(), DType::F32, &[4]) };
        for (submission, text) in [(unfit, "must add up to the rows"), (elsewhere, "no backend serves memory on cuda")]
        {
            let result = world.submit(submission)?.wait();
            assert!(matches!(&result, Err(Error::Invalid(detail)) if detail.contains(text)), "{result:?}");
            works(world)?;
        }
        Ok(())
    });
}

#[test]
fn a_group_is_refused_as_a_whole_where_its_tensors_differ() {
    on_ranks(3, |world| {
        for lengths in [&[2, 3][..], &[2, 4], &[2]] {
            let own = if world.rank() == 1 { lengths } else { &[2, 3] };
            let tensors = own.iter().map(|&length| vec![1.0f32; length]).collect();
            let result = world.grouped_allreduce_async("group", tensors, ReduceOp::Sum)?.wait();
            if lengths == [2, 3] {
                assert_eq!(result?, vec![vec![3.0; 2], vec![3.0; 3]]);
                continue;
            }
            let told = match lengths {
                [2] => "allreduce(Sum) of f32 [2]",
                _ => "allreduce(Sum) of 2 tensors: f32 [2], f32 [4]",
            };
            let text = format!("ranks 0, 2 sent allreduce(Sum) of 2 tensors: f32 [2], f32 [3]; rank 1 sent {told}");
            assert!(matches!(&result, Err(Error::Mismatch { detail, .. }) if *detail == text), "{result:?}");
            works(world)?;
        }
        Ok(())
    });
}

#[test]
fn the_ranks_of_a_set_are_named_as_the_world_numbers_them() {
    on_ranks(3, |world| {
        if let Some(set) = world.process_set(&[1, 2])? {
            let result = set.broadcast("root", &mut [1.0f32], world.rank());
            let text = "rank 1 sent broadcast(root 1) of f32 [1]; rank 2 sent broadcast(root 2) of f32 [1]";
            assert!(matches!(&result, Err(Error::Mismatch { detail, .. }) if detail == text), "{result:?}");
            set.barrier()?;
        }
        works(world)
    });
}
