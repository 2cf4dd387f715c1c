//! The operations that Horovod has beside allreduce, broadcast and allgather, on tensors of every kind and layout.

mod common;

use common::{numbers, ranks, values, watched};
use hvd_torch::{ReduceOp, ops};
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 10] = [
    Kind::Half,
    Kind::BFloat16,
    Kind::Float,
    Kind::Double,
    Kind::Int,
    Kind::Int64,
    Kind::Uint8,
    Kind::Int8,
    Kind::Int16,
    Kind::Bool,
];

/// `value` in every element; for bool, whether it is odd.
fn filled(size: &[i64], value: i64, kind: Kind) -> Tensor {
    let value = if kind == Kind::Bool { value % 2 } else { value };
    Tensor::full(size, value, (kind, Device::Cpu))
}

#[test]
fn rows_of_any_kind_go_to_their_ranks() {
    watched(|| {
        for size in [1i64, 2, 3] {
            ranks(size as usize, |world| {
                let rank = world.rank() as i64;
                for kind in KINDS {
                    // Rank r sends r + to rows to rank `to`, from a transposed tensor.
                    let splits: Vec<_> = (0..size).map(|to| rank + to).collect();
                    let rows = filled(&[2, splits.iter().sum()], rank, kind).tr();
                    let name = format!("{kind:?}");
                    let (got, received) = ops::alltoall(&world, &rows, &name, Some(&splits)).unwrap();
                    assert_eq!(received, (0..size).map(|from| from + rank).collect::<Vec<_>>());
                    let expected: Vec<_> = (0..size).map(|from| filled(&[from + rank, 2], from, kind)).collect();
                    assert_eq!((got.kind(), &got), (kind, &Tensor::cat(&expected, 0)), "{kind:?}");

                    let (equal, _) = ops::alltoall(&world, &filled(&[size], rank, kind), &name, None).unwrap();
                    let expected: Vec<_> = (0..size).map(|from| filled(&[1], from, kind)).collect();
                    assert_eq!(equal, Tensor::cat(&expected, 0), "{kind:?}");
                }
                // Rows without elements are counted all the same.
                let (none, received) =
                    ops::alltoall(&world, &filled(&[2 * size, 0], 0, Kind::Float), "thin", None).unwrap();
                assert_eq!((none.size(), received), (vec![2 * size, 0], vec![2; size as usize]));
                let error = ops::alltoall(&world, &filled(&[1], 0, Kind::Float), "odd", Some(&[-1])).unwrap_err();
                assert!(error.to_string().contains("-1 rows"), "{error}");
            });
        }
    });
}

#[test]
fn each_rank_gets_its_share_of_the_reduction() {
    watched(|| {
        for size in [1i64, 2, 3] {
            ranks(size as usize, |world| {
                let rank = world.rank() as i64;
                for kind in [Kind::BFloat16, Kind::Float, Kind::Double, Kind::Int, Kind::Int64] {
                    // 5 rows: the first ranks get one more.
                    let rows = Tensor::arange(5, (kind, Device::Cpu)).view([5, 1]).repeat([1, 3]);
                    let whole = &rows * size;
                    let share = whole.tensor_split(size, 0).remove(rank as usize);
                    let name = format!("{kind:?}");
                    let transposed = rows.tr().contiguous().tr();
                    let mine = ops::reducescatter(&world, &transposed, &name, ReduceOp::Sum).unwrap();
                    assert_eq!((mine.kind(), &mine), (kind, &share), "{kind:?}");
                    let handle = ops::reducescatter_async(&world, &rows, &name, ReduceOp::Average).unwrap();
                    let share = rows.tensor_split(size, 0).remove(rank as usize);
                    assert_eq!(handle.wait().unwrap(), share, "{kind:?}");
                }
                let scalar = ops::reducescatter(&world, &Tensor::from(1.0), "scalar", ReduceOp::Sum).unwrap_err();
                assert!(scalar.to_string().contains("view([1])"), "{scalar}");
            });
        }
    });
}

#[test]
fn groups_are_one_unit_in_place_and_out_of_place() {
    watched(|| {
        for size in [1i64, 2, 3] {
            ranks(size as usize, |world| {
                let rank = world.rank() as i64;
                let sum = size * (size - 1) / 2;
                let tensors = [filled(&[3], rank, Kind::Float), filled(&[2, 2], rank, Kind::Int64).tr()];
                let references: Vec<_> = tensors.iter().collect();
                let handle = ops::grouped_allreduce_async(&world, &references, "new", ReduceOp::Sum).unwrap();
                let new = handle.wait().unwrap();
                assert_eq!(new[0], filled(&[3], sum, Kind::Float));
                assert_eq!(new[1], filled(&[2, 2], sum, Kind::Int64));
                assert_eq!(values(&tensors[0]), [rank as f64; 3]);
                ops::grouped_allreduce_(&world, &references, "same", ReduceOp::Sum).unwrap();
                assert_eq!(tensors[1], filled(&[2, 2], sum, Kind::Int64));

                let (bytes, flags) = (filled(&[rank], rank, Kind::Uint8), filled(&[1, 2], rank, Kind::Bool));
                let gathered = ops::grouped_allgather_async(&world, &[&bytes, &flags], "rows").unwrap();
                let gathered = gathered.wait_with_rows().unwrap();
                assert_eq!(gathered[0].1, (0..size).collect::<Vec<_>>());
                let expected: Vec<_> = (0..size).map(|from| filled(&[from], from, Kind::Uint8)).collect();
                assert_eq!(gathered[0].0, Tensor::cat(&expected, 0));
                assert_eq!(gathered[1].0.size(), [size, 2]);

                let rows = filled(&[size + 1, 2], 1, Kind::Double);
                let shares = ops::grouped_reducescatter(&world, &[&rows, &(&rows * 2.0)], "shares", ReduceOp::Sum);
                let own = if rank == 0 { 2 } else { 1 };
                assert_eq!(shares.unwrap()[1], filled(&[own, 2], 2 * size, Kind::Double));
            });
        }
    });
}

#[test]
fn sparse_tensors_are_summed_where_they_have_entries() {
    watched(|| {
        for size in [1i64, 2, 3] {
            ranks(size as usize, |world| {
                let rank = world.rank() as i64;
                for (op, divisor) in [(ReduceOp::Sum, 1), (ReduceOp::Average, size)] {
                    // Entries of two dimensions, with rows of three; one comes twice, and rank r has r of its own.
                    let own: Vec<_> = (0..rank).map(|at| at + 2).collect();
                    let first: Vec<_> = [0, 0].into_iter().chain(own.iter().copied()).collect();
                    let second: Vec<_> = [1, 1].into_iter().chain(own.iter().map(|_| rank)).collect();
                    let indices = Tensor::from_slice(&[first.clone(), second].concat()).view([2, first.len() as i64]);
                    let entries = numbers(&[first.len() as i64, 3], Kind::Double, rank);
                    let options = (Kind::Double, Device::Cpu);
                    let shape = [5, 4, 3];
                    let sparse = Tensor::sparse_coo_tensor_indices_size(&indices, &entries, shape, options, false);
                    let result = ops::sparse_allreduce(&world, &sparse, "table", op).unwrap();
                    assert!(result.is_sparse() && result.is_coalesced());
                    let dense = ops::allreduce(&world, &sparse.to_dense(None, false), "dense", ReduceOp::Sum).unwrap();
                    assert!((result.to_dense(None, false) - dense / divisor).abs().max().double_value(&[]) < 1e-15);
                }
                let dense = Tensor::zeros([2], (Kind::Float, Device::Cpu));
                let error = ops::sparse_allreduce(&world, &dense, "dense", ReduceOp::Sum).unwrap_err().to_string();
                assert!(error.contains("not sparse"), "{error}");
            });
        }
    });
}

#[test]
fn a_sparse_average_is_over_the_ranks_that_have_not_joined() {
    watched(|| {
        ranks(3, |world| {
            if world.rank() != 2 {
                let whole = Tensor::from_slice(&[0.0, 6.0 * world.rank() as f64]);
                // Rank 0 has no entry, and counts all the same.
                let sparse = whole.to_sparse_sparse_dim(1);
                let average = ops::sparse_allreduce(&world, &sparse, "table", ReduceOp::Average).unwrap();
                assert_eq!(values(&average.to_dense(None, false)), [0.0, 3.0]);
            }
            world.join().unwrap();
        });
    });
}

#[test]
fn new_tensors_and_handles_of_every_kind() {
    watched(|| {
        ranks(2, |world| {
            let rank = world.rank() as i64;
            let under_way: Vec<_> = KINDS
                .iter()
                .map(|&kind| {
                    let own = filled(&[3], rank + 1, kind);
                    let gather = ops::allgather_async(&world, &own, &format!("gather {kind:?}")).unwrap();
                    let cast = ops::broadcast_async(&world, &own, &format!("cast {kind:?}"), 1).unwrap();
                    (kind, gather, cast)
                })
                .collect();
            for (kind, gather, cast) in under_way {
                let all = Tensor::cat(&[filled(&[3], 1, kind), filled(&[3], 2, kind)], 0);
                assert_eq!(gather.wait().unwrap(), all, "{kind:?}");
                assert_eq!(cast.wait().unwrap(), filled(&[3], 2, kind), "{kind:?}");
            }
            let x = filled(&[2], rank, Kind::BFloat16);
            let sum = ops::allreduce_async(&world, &x, "x", ReduceOp::Sum).unwrap();
            assert_eq!(values(&sum.wait().unwrap()), [1.0, 1.0]);
            assert_eq!(values(&x), [rank as f64; 2]);
        });
    });
}

#[test]
fn tensors_go_from_rank_to_rank() {
    const LONGER: u32 = 1000;
    watched(|| {
        ranks(2, |world| {
            for (tag, kind) in KINDS.into_iter().enumerate() {
                let columns = filled(&[3, 2], 1, kind).tr();
                if world.rank() == 0 {
                    ops::send_async(&world, &columns, 1, tag as u32).unwrap().wait().unwrap();
                    let error = ops::send(&world, &columns, 1, LONGER).unwrap_err().to_string();
                    assert!(error.contains("rank 1"), "{error}");
                } else {
                    let outer = filled(&[2, 5], 0, kind);
                    ops::recv_(&world, &outer.narrow(1, 1, 3), 0, tag as u32).unwrap();
                    assert_eq!(values(&outer), [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], "{kind:?}");
                    let shorter = ops::recv_async_(&world, &filled(&[5], 0, kind), 0, LONGER).unwrap();
                    let error = shorter.wait().unwrap_err().to_string();
                    assert!(error.contains("rank 0"), "{error}");
                }
            }
        });
    });
}
