//! Collective operations on tensors with ranks that are threads.

mod common;

use common::{numbers, ranks, values, watched};
use hvd_torch::{AdamW, Allreduce, Compression, Optimizer, ParamGroup, ReduceOp, TchOptimizer, ops};
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};

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

#[test]
fn broadcast_reaches_any_kind_and_layout() {
    watched(|| {
        for size in [1, 2, 3] {
            let root = size - 1;
            ranks(size, |world| {
                // Rank r holds r + 1 everywhere; bool: whether it is the root.
                let fill = |kind: Kind| match kind {
                    Kind::Bool => (world.rank() == root) as i64,
                    _ => world.rank() as i64 + 1,
                };
                let whole = |kind: Kind| Tensor::full([4, 6], fill(kind), (kind, Device::Cpu));
                let mut tensors: Vec<(String, Tensor)> =
                    KINDS.iter().map(|kind| (format!("{kind:?}"), whole(*kind))).collect();
                tensors.push(("transposed".into(), whole(Kind::Float).tr()));
                let outer = whole(Kind::Int64);
                tensors.push(("columns".into(), outer.narrow(1, 2, 2)));
                tensors.push(("scalar".into(), Tensor::from(fill(Kind::Float))));
                tensors.push(("empty".into(), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))));
                let leaf = (whole(Kind::Float) * 1.0).set_requires_grad(true);
                tensors.push(("leaf".into(), leaf));
                ops::broadcast_parameters(&world, &tensors, root).unwrap();
                for (name, tensor) in &tensors {
                    let expected = if name == "Bool" { 1.0 } else { size as f64 };
                    assert!(values(tensor).iter().all(|x| *x == expected), "{name}: {tensor}");
                }
                assert_eq!(values(&outer)[0], fill(Kind::Int64) as f64, "beside the columns nothing changes");
                assert!(tensors.last().unwrap().1.requires_grad());
            });
        }
    });
}

#[test]
fn broadcast_refuses_bad_lists() {
    ranks(1, |world| {
        let list = vec![("x".to_string(), Tensor::from(1.0)), ("x".to_string(), Tensor::from(1.0))];
        assert!(ops::broadcast_parameters(&world, &list, 0).unwrap_err().to_string().contains("`x`"));
        assert!(ops::broadcast_parameters(&world, &list[..1], 1).unwrap_err().to_string().contains("no rank 1"));
    });
}

#[test]
fn optimizer_state_is_broadcast() {
    watched(|| {
        ranks(2, |world| {
            let x = numbers(&[5], Kind::Float, 1).detach().set_requires_grad(true);
            let group = ParamGroup { params: vec![("x".into(), x.shallow_clone())], lr: 0.1, weight_decay: 0.0 };
            let mut adamw = AdamW::new(vec![group], (0.9, 0.95), 1e-8).unwrap();
            for _ in 0..3 * (2 - world.rank()) {
                adamw.zero_grad().unwrap();
                x.square().sum(Kind::Float).backward();
                adamw.step().unwrap();
            }
            ops::broadcast_optimizer_state(&world, &mut adamw, 0).unwrap();
            let state: Vec<f64> = adamw.state().unwrap().iter().flat_map(|(_, tensor)| values(tensor)).collect();
            assert_eq!(*state.last().unwrap(), 6.0);
            let all = ops::allgather(&world, &Tensor::from_slice(&state), "state").unwrap();
            let (mine, theirs) = (all.chunk(2, 0).remove(0), all.chunk(2, 0).remove(1));
            assert_eq!(values(&mine), values(&theirs));

            let vars = nn::VarStore::new(Device::Cpu);
            let mut sgd = TchOptimizer::new(nn::Sgd::default().build(&vars, 0.1).unwrap(), &vars).unwrap();
            assert!(ops::broadcast_optimizer_state(&world, &mut sgd, 0).is_err());
        });
    });
}

#[test]
fn allreduce_gives_a_new_tensor_or_works_in_place() {
    watched(|| {
        for size in [1, 2, 3] {
            ranks(size, |world| {
                let (n, rank) = (size as f64, world.rank() as f64);
                let x = Tensor::from_slice(&[rank, 10.0]).set_requires_grad(true);
                let mean = ops::allreduce(&world, &x, "mean", ReduceOp::Average).unwrap();
                assert_eq!(values(&mean), [(n - 1.0) / 2.0, 10.0]);
                assert_eq!(values(&x), [rank, 10.0]);
                let square = Tensor::from_slice2(&[[rank, 1.0], [2.0, 3.0]]);
                ops::allreduce_(&world, &square.tr(), "sum", ReduceOp::Sum).unwrap();
                assert_eq!(values(&square), [n * (n - 1.0) / 2.0, n, 2.0 * n, 3.0 * n]);
                let options = Allreduce::sum().compression(Compression::Bf16);
                let ones = ops::allreduce(&world, &Tensor::ones([100], (Kind::Float, Device::Cpu)), "narrow", options);
                assert!(values(&ones.unwrap()).iter().all(|x| *x == n));
                let handle = ops::allreduce_async_(&world, &square, "async", ReduceOp::Max).unwrap();
                assert_eq!(values(&handle.wait().unwrap())[1], n);
                let complex = Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu));
                let error = ops::allreduce(&world, &complex, "complex", ReduceOp::Sum).unwrap_err().to_string();
                assert!(error.contains("ComplexFloat"), "{error}");
            });
        }
    });
}

#[test]
fn broadcast_of_one_tensor() {
    watched(|| {
        ranks(2, |world| {
            let x = Tensor::from_slice(&[world.rank() as i64, 7]);
            assert_eq!(values(&ops::broadcast(&world, &x, "new", 1).unwrap()), [1.0, 7.0]);
            assert_eq!(values(&x)[0], world.rank() as f64);
            ops::broadcast_(&world, &x, "same", 1).unwrap();
            assert_eq!(values(&x), [1.0, 7.0]);
        });
    });
}

#[test]
fn allgather_joins_unequal_parts() {
    watched(|| {
        for size in [1, 2, 3] {
            ranks(size, |world| {
                let rank = world.rank() as i64;
                // Rank r gives r rows of (r, r), from a transposed tensor.
                let rows = Tensor::full([2, rank], rank, (Kind::Int64, Device::Cpu)).tr();
                let all = ops::allgather(&world, &rows, "rows").unwrap();
                let expected: Vec<f64> = (0..size).flat_map(|r| vec![r as f64; 2 * r]).collect();
                assert_eq!(all.size(), [expected.len() as i64 / 2, 2]);
                assert_eq!(values(&all), expected);
                let error = ops::allgather(&world, &Tensor::from(1.0), "scalar").unwrap_err().to_string();
                assert!(error.contains("view([1])"), "{error}");
            });
        }
    });
}

#[test]
fn metrics_are_averaged_in_double() {
    watched(|| {
        for size in [1, 2, 3] {
            ranks(size, |world| {
                let mean = ops::metric_average(&world, 1e9 + world.rank() as f64, "loss").unwrap();
                assert_eq!(mean, 1e9 + (size as f64 - 1.0) / 2.0);
            });
        }
    });
}
