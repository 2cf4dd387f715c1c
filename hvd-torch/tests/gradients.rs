//! Gradients through collective operations, against one process that computes all ranks' losses.

mod common;

use common::{distance, numbers, ranks, watched};
use hvd_torch::nn::{SyncBatchNorm, SyncBatchNormConfig};
use hvd_torch::{Allreduce, ReduceOp, World, ops};
use tch::{Device, Kind, Tensor, nn};

/// Rank r's input, (3 + r, 4) or of `rows` rows.
fn input(rank: usize, rows: i64) -> Tensor {
    numbers(&[rows, 4], Kind::Double, rank as i64).detach().set_requires_grad(true)
}

/// What rank r makes of its result: a loss that weighs every element and rank in another way.
fn loss(rank: usize, result: &Tensor) -> Tensor {
    (result * numbers(&result.size(), Kind::Double, 50 + rank as i64) + result.square() * 0.1).sum(Kind::Double)
}

/// Runs an operation with ranks, and `alone`, which gives every rank's result from all ranks' inputs, in one process; then
/// compares results and gradients.
fn check(
    size: usize,
    rows: impl Fn(usize) -> i64 + Sync,
    operation: impl Fn(&World, &Tensor) -> Tensor + Sync,
    alone: impl Fn(&[Tensor]) -> Vec<Tensor>,
) {
    let together = ranks(size, |world| {
        let own = input(world.rank(), rows(world.rank()));
        // Not a leaf, so that the graph has something on both sides.
        let result = operation(&world, &(&own * 2.0));
        loss(world.rank(), &result).backward();
        (result.detach(), own.grad())
    });
    let inputs: Vec<_> = (0..size).map(|rank| input(rank, rows(rank))).collect();
    let results = alone(&inputs.iter().map(|input| input * 2.0).collect::<Vec<_>>());
    let losses: Vec<_> = results.iter().enumerate().map(|(rank, result)| loss(rank, result)).collect();
    Tensor::stack(&losses, 0).sum(Kind::Double).backward();
    for (rank, (result, grad)) in together.iter().enumerate() {
        assert!(distance(result, &results[rank]) < 1e-12, "result of rank {rank}");
        assert!(distance(grad, &inputs[rank].grad()) < 1e-12, "gradient of rank {rank}");
    }
}

fn sum(tensors: &[Tensor]) -> Tensor {
    Tensor::stack(tensors, 0).sum_dim_intlist(0i64, false, Kind::Double)
}

fn copies(tensor: Tensor, size: usize) -> Vec<Tensor> {
    (0..size).map(|_| tensor.shallow_clone()).collect()
}

#[test]
fn allreduce_has_the_gradient_of_a_sum() {
    watched(|| {
        for size in [1, 2, 3] {
            let options = Allreduce::average().prescale(0.5).postscale(3.0);
            let operation = |world: &World, x: &Tensor| ops::allreduce(world, x, "x", options).unwrap();
            check(size, |_| 5, operation, |all| copies(sum(all) * 1.5 / size as f64, size));
            let grouped = |world: &World, x: &Tensor| {
                let both = ops::grouped_allreduce(world, &[x, &x.sin()], "x", ReduceOp::Sum).unwrap();
                &both[0] * &both[1]
            };
            let alone = |all: &[Tensor]| sum(all) * sum(&all.iter().map(Tensor::sin).collect::<Vec<_>>());
            check(size, |_| 5, grouped, |all| copies(alone(all), size));
        }
    });
}

#[test]
fn a_result_that_nothing_is_computed_from_has_a_gradient_of_zeros() {
    watched(|| {
        ranks(2, |world| {
            let x = input(world.rank(), 2);
            let results = ops::grouped_allreduce(&world, &[&x, &(&x * 3.0)], "pair", ReduceOp::Sum).unwrap();
            // Each rank uses another one of the two.
            results[world.rank()].sum(Kind::Double).backward();
            assert!(distance(&x.grad(), &(x.ones_like() * 4.0)) < 1e-12);
        });
    });
}

#[test]
fn broadcast_gives_the_root_everybodys_gradient() {
    watched(|| {
        for size in [1, 2, 3] {
            let root = size - 1;
            let operation = |world: &World, x: &Tensor| ops::broadcast(world, x, "x", root).unwrap();
            let alone = |all: &[Tensor]| {
                // The others get zeros, not nothing.
                let zeros = sum(all) * 0.0;
                copies(&all[root] + zeros, size)
            };
            check(size, |_| 3, operation, alone);
        }
    });
}

#[test]
fn allgather_gives_each_rank_what_its_rows_did() {
    watched(|| {
        for size in [1, 2, 3] {
            let rows = |rank: usize| rank as i64 * 2;
            let operation = |world: &World, x: &Tensor| ops::allgather(world, x, "x").unwrap();
            check(size, rows, operation, |all| copies(Tensor::cat(all, 0), size));
            let grouped = |world: &World, x: &Tensor| {
                let parts = ops::grouped_allgather(world, &[x, &x.cos()], "x").unwrap();
                Tensor::cat(&parts, 1)
            };
            let alone = |all: &[Tensor]| {
                let cosines: Vec<_> = all.iter().map(Tensor::cos).collect();
                Tensor::cat(&[Tensor::cat(all, 0), Tensor::cat(&cosines, 0)], 1)
            };
            check(size, rows, grouped, |all| copies(alone(all), size));
        }
    });
}

#[test]
fn alltoall_sends_gradients_back() {
    watched(|| {
        for size in [1i64, 2, 3] {
            // Rank r sends r + to rows to rank `to`.
            let splits = |rank: i64| (0..size).map(|to| rank + to).collect::<Vec<_>>();
            let rows = |rank: usize| splits(rank as i64).iter().sum();
            let operation = |world: &World, x: &Tensor| {
                let rank = world.rank() as i64;
                let (result, received) = ops::alltoall(world, x, "x", Some(&splits(rank))).unwrap();
                assert_eq!(received, (0..size).map(|from| from + rank).collect::<Vec<_>>());
                result
            };
            let alone = |all: &[Tensor]| {
                let parts: Vec<_> =
                    all.iter().enumerate().map(|(rank, x)| x.split_with_sizes(splits(rank as i64), 0)).collect();
                let of = |to: usize| Tensor::cat(&parts.iter().map(|parts| &parts[to]).collect::<Vec<_>>(), 0);
                (0..size as usize).map(of).collect()
            };
            check(size as usize, rows, operation, alone);
        }
    });
}

#[test]
fn reducescatter_has_the_gradient_of_its_share() {
    watched(|| {
        for (size, options) in [(1, Allreduce::sum()), (2, Allreduce::sum()), (3, Allreduce::average().prescale(2.0))] {
            // 7 rows: the first ranks get one more.
            let shares = |whole: Tensor| whole.tensor_split(size as i64, 0);
            let mean = if options.op == ReduceOp::Average { size as f64 } else { 1.0 };
            let operation = |world: &World, x: &Tensor| ops::reducescatter(world, x, "x", options).unwrap();
            check(size, |_| 7, operation, |all| shares(sum(all) * options.prescale / mean));
            let grouped = |world: &World, x: &Tensor| {
                let parts = ops::grouped_reducescatter(world, &[x, &x.exp()], "x", options).unwrap();
                Tensor::cat(&parts, 1)
            };
            let alone = |all: &[Tensor]| {
                let exps: Vec<_> = all.iter().map(Tensor::exp).collect();
                shares(Tensor::cat(&[sum(all), sum(&exps)], 1) * options.prescale / mean)
            };
            check(size, |_| 7, grouped, alone);
        }
    });
}

#[test]
fn the_gradient_of_a_gradient_goes_through() {
    watched(|| {
        ranks(2, |world| {
            let x = input(0, 2);
            let y = ops::allreduce(&world, &x, "x", ReduceOp::Sum).unwrap();
            let [grad] = &Tensor::run_backward(&[y.pow_tensor_scalar(3).sum(Kind::Double)], &[&x], true, true)[..]
            else {
                panic!("one gradient");
            };
            // With x and x' on the ranks: the gradient is 6 (x + x')^2 on both, and its sum over both has 24 (x + x').
            assert!(distance(grad, &(x.square() * 24.0)) < 1e-12);
            grad.sum(Kind::Double).backward();
            assert!(distance(&x.grad(), &(&x * 48.0)) < 1e-9, "{} {}", x.grad(), x);
        });
    });
}

#[test]
fn what_has_no_gradient_says_so() {
    watched(|| {
        ranks(2, |world| {
            let x = input(0, 2);
            let error = ops::allreduce(&world, &x, "x", ReduceOp::Max).unwrap_err().to_string();
            assert!(error.contains("Max over ranks has no gradient"), "{error}");
            let max = tch::no_grad(|| ops::allreduce(&world, &x, "x", ReduceOp::Max)).unwrap();
            assert!(!max.requires_grad());
            let sum = ops::allreduce(&world, &x.detach(), "x", ReduceOp::Sum).unwrap();
            assert!(!sum.requires_grad());
        });
    });
}

#[test]
fn a_backward_pass_that_fails_is_an_error_of_backward() {
    watched(|| {
        ranks(2, |world| {
            let x = input(0, 2 + world.rank() as i64);
            let all = ops::allgather(&world, &x, "x").unwrap();
            // Another tensor of the gradient's name, so that the ranks disagree.
            let odd = Tensor::zeros([1 + world.rank() as i64], (Kind::Float, Device::Cpu));
            ops::allreduce(&world, &odd, "x.grad", ReduceOp::Sum).unwrap_err();
            let loss = all.narrow(0, 0, 1 + world.rank() as i64).sum(Kind::Double);
            loss.backward();
            assert_eq!(x.grad().size(), x.size());
            let y = ops::broadcast(&world, &input(0, 2), "y", 0).unwrap();
            world.shutdown().unwrap();
            let error = hvd_torch::autograd::backward(&[(&y.sum(Kind::Double), None)], false).unwrap_err().to_string();
            assert!(error.contains("shut down"), "{error}");
        });
    });
}

/// A batch for each rank: (2 + r, 3, 5).
fn images(rank: usize, kind: Kind) -> Tensor {
    let offset = Tensor::from_slice(&[0.0, 10.0, -3.0]).view([1, 3, 1]);
    (numbers(&[2 + rank as i64, 3, 5], Kind::Double, rank as i64) + offset)
        .to_kind(kind)
        .detach()
        .set_requires_grad(true)
}

#[test]
fn batch_norm_over_ranks_is_batch_norm_of_the_whole_batch() {
    watched(|| {
        for (size, kind, tolerance) in [(1, Kind::Float, 1e-4), (3, Kind::Float, 1e-4), (2, Kind::BFloat16, 0.1)] {
            let weigh = |rank: usize, y: &Tensor| y * numbers(&y.size(), Kind::Float, 90 + rank as i64);
            let run = |vars: &nn::VarStore| {
                let variables = vars.variables();
                ["weight", "bias"].map(|name| variables[name].shallow_clone())
            };
            let together = ranks(size, |world| {
                let vars = nn::VarStore::new(Device::Cpu);
                let layer = SyncBatchNorm::new(vars.root(), &world, 3, SyncBatchNormConfig::default());
                let x = images(world.rank(), kind);
                let y = layer.forward(&x, true).unwrap();
                assert_eq!(y.kind(), kind);
                weigh(world.rank(), &y).sum(Kind::Float).backward();
                let evaluated = layer.forward(&x, false).unwrap().detach();
                (y.detach(), evaluated, x.grad(), run(&vars).map(|param| param.grad()))
            });
            let vars = nn::VarStore::new(Device::Cpu);
            let layer = nn::batch_norm1d(
                vars.root(),
                3,
                nn::BatchNormConfig { ws_init: nn::Init::Const(1.0), ..Default::default() },
            );
            let inputs: Vec<_> = (0..size).map(|rank| images(rank, kind)).collect();
            let whole = Tensor::cat(&inputs, 0).to_kind(Kind::Float);
            let y = nn::ModuleT::forward_t(&layer, &whole, true);
            let lengths: Vec<_> = inputs.iter().map(|x| x.size()[0]).collect();
            let parts = y.split_with_sizes(&lengths, 0);
            let losses: Vec<_> = parts.iter().enumerate().map(|(rank, y)| weigh(rank, y).sum(Kind::Float)).collect();
            Tensor::stack(&losses, 0).sum(Kind::Float).backward();
            let evaluated = nn::ModuleT::forward_t(&layer, &whole, false).split_with_sizes(&lengths, 0);
            let grads: Vec<_> = (0..2)
                .map(|at| together.iter().map(|(_, _, _, grads)| grads[at].shallow_clone()).collect::<Vec<_>>())
                .map(|grads| Tensor::stack(&grads, 0).sum_dim_intlist(0i64, false, Kind::Float))
                .collect();
            for (rank, (y, evaluation, grad, _)) in together.iter().enumerate() {
                assert!(distance(y, &parts[rank]) < tolerance, "{kind:?}: result of rank {rank}");
                assert!(distance(evaluation, &evaluated[rank]) < tolerance, "{kind:?}: evaluation of rank {rank}");
                assert!(distance(grad, &inputs[rank].grad()) < tolerance, "{kind:?}: gradient of rank {rank}");
            }
            for (together, alone) in grads.iter().zip(run(&vars)) {
                assert!(distance(together, &alone.grad()) < 20.0 * tolerance, "{kind:?}: parameters");
            }
        }
    });
}

#[test]
fn batch_norm_takes_an_empty_batch_on_one_rank_and_refuses_nonsense() {
    watched(|| {
        ranks(2, |world| {
            let vars = nn::VarStore::new(Device::Cpu);
            let config = SyncBatchNormConfig { track_running_stats: false, affine: false, ..Default::default() };
            let layer = SyncBatchNorm::new(vars.root() / "layer", &world, 2, config);
            let rows = if world.rank() == 0 { 0 } else { 6 };
            let x = numbers(&[rows, 2], Kind::Double, 1).detach().set_requires_grad(true);
            let y = layer.forward(&x, true).unwrap();
            y.square().sum(Kind::Double).backward();
            assert_eq!(x.grad().size(), [rows, 2]);
            assert!(rows == 0 || (y.mean(Kind::Double).double_value(&[])).abs() < 1e-9);
            let error =
                layer.forward(&Tensor::zeros([4, 3], (Kind::Float, Device::Cpu)), true).unwrap_err().to_string();
            assert!(error.contains("`layer`") && error.contains("(N, 2, ...)"), "{error}");
            let single = Tensor::zeros([1 - world.rank() as i64, 2], (Kind::Float, Device::Cpu));
            assert!(layer.forward(&single, true).unwrap_err().to_string().contains("needs two"));
        });
    });
}
