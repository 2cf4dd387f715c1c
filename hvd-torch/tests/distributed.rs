//! DistributedOptimizer with ranks that are threads.

mod common;

use common::{Mlp, SIZES, adamw, distance, numbers, ranks, ranks_sharing, values, watched};
use hvd_torch::autograd::{self, Onto};
use hvd_torch::{
    AdamW, Builder, Compression, DistributedOptimizer, Optimizer, ReduceOp, TchOptimizer, World, set_grad,
};
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};

/// Rows of a global batch; divides by all sizes, twice.
const ROWS: i64 = 12;

fn builder(world: &World, mlp: &Mlp) -> Builder<AdamW> {
    DistributedOptimizer::builder(adamw(mlp.shallow())).world(world.clone())
}

fn global_batch(kind: Kind, step: i64) -> Tensor {
    numbers(&[ROWS, 8], kind, step)
}

/// A rank's rows of a global batch.
fn local_batch(world: &World, kind: Kind, step: i64) -> Tensor {
    let rows = ROWS / world.size() as i64;
    global_batch(kind, step).narrow(0, rows * world.rank() as i64, rows)
}

/// The gradients of one process on the whole batch.
fn joined_gradients(kind: Kind) -> Vec<Tensor> {
    let mlp = Mlp::new(kind);
    mlp.loss(&global_batch(kind, 0)).backward();
    mlp.gradients()
}

/// One synchronized backward pass on `size` ranks: rank 0's gradients, after a check that all ranks have the same bits.
fn reduced_gradients(size: usize, kind: Kind, configure: fn(Builder<AdamW>) -> Builder<AdamW>) -> Vec<Tensor> {
    let mut all = ranks(size, |world| {
        let mlp = Mlp::new(kind);
        let mut optimizer = configure(builder(&world, &mlp)).build().unwrap();
        mlp.loss(&local_batch(&world, kind, 0)).backward();
        optimizer.synchronize().unwrap();
        mlp.gradients()
    });
    let bits = |gradients: &Vec<Tensor>| gradients.iter().map(values).collect::<Vec<_>>();
    assert!(all.iter().all(|rank| bits(rank) == bits(&all[0])), "ranks differ");
    all.swap_remove(0)
}

fn worst(a: &[Tensor], b: &[Tensor]) -> f64 {
    a.iter().zip(b).map(|(a, b)| distance(a, b)).fold(0.0, f64::max)
}

#[test]
fn averaged_gradients_are_those_of_the_joined_batch() {
    watched(|| {
        for size in SIZES {
            let expected = joined_gradients(Kind::Double);
            let one_bucket = reduced_gradients(size, Kind::Double, |builder| builder);
            assert!(worst(&one_bucket, &expected) < 1e-15, "{size} ranks");
            let many_buckets = reduced_gradients(size, Kind::Double, |builder| builder.bucket_bytes(1));
            assert!(worst(&many_buckets, &expected) < 1e-15, "{size} ranks");
            let summed = reduced_gradients(size, Kind::Double, |builder| builder.op(ReduceOp::Sum));
            let factor = size as f64;
            assert!(summed.iter().zip(&expected).all(|(sum, mean)| distance(sum, &(mean * factor)) < 1e-14));
        }
    });
}

#[test]
fn compression_narrows_the_wire_only() {
    watched(|| {
        for size in SIZES {
            let expected = joined_gradients(Kind::Float);
            for (configure, tolerance) in [
                ((|builder| builder.compression(Compression::Bf16)) as fn(Builder<AdamW>) -> Builder<AdamW>, 1e-2),
                (|builder| builder.compression(Compression::Fp16), 1e-3),
            ] {
                let gradients = reduced_gradients(size, Kind::Float, configure);
                assert_eq!(gradients[0].kind(), Kind::Float);
                let off = worst(&gradients, &expected);
                assert!(off < tolerance, "{size} ranks: {off}");
                assert!(size == 1 || off > 1e-7, "{size} ranks: nothing was narrowed");
            }
        }
    });
}

#[test]
fn bf16_parameters_work() {
    watched(|| {
        for size in SIZES {
            let off =
                worst(&reduced_gradients(size, Kind::BFloat16, |builder| builder), &joined_gradients(Kind::BFloat16));
            assert!(off < 2e-2, "{size} ranks: {off}");
        }
    });
}

/// Trains on `size` ranks with accumulation and clipping; the losses over the whole batch, and the final parameters.
fn train(size: usize, passes: usize) -> (Vec<f64>, Vec<Vec<f64>>) {
    let all = ranks(size, |world| {
        let mlp = Mlp::new(Kind::Double);
        let mut optimizer = builder(&world, &mlp).backward_passes_per_step(passes).build().unwrap();
        let mut losses = Vec::new();
        for step in 0..8 {
            optimizer.zero_grad().unwrap();
            let batch = local_batch(&world, Kind::Double, step);
            for micro in batch.chunk(passes as i64, 0) {
                (mlp.loss(&micro) / passes as f64).backward();
            }
            assert!(optimizer.clip_grad_norm(0.05).unwrap() > 0.05, "clipping is active");
            optimizer.step().unwrap();
            losses.push(mlp.loss(&global_batch(Kind::Double, step)).double_value(&[]));
        }
        (losses, mlp.params.iter().map(|(_, param)| values(param)).collect())
    });
    assert!(all.iter().all(|rank| *rank == all[0]), "ranks differ");
    all.into_iter().next().unwrap()
}

#[test]
fn training_does_not_depend_on_ranks_or_accumulation() {
    watched(|| {
        let (expected, _) = train(1, 1);
        assert!(expected[7] < expected[0]);
        for (size, passes) in [(1, 2), (2, 1), (2, 3), (3, 2)] {
            let (losses, _) = train(size, passes);
            let off = losses.iter().zip(&expected).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
            assert!(off < 1e-12, "{size} ranks, {passes} passes: {off}");
            assert_eq!(train(size, passes), train(size, passes), "two runs differ");
        }
    });
}

#[test]
fn unused_parameters_are_reduced_as_zeros() {
    watched(|| {
        for size in SIZES {
            let all = ranks(size, |world| {
                let x = |at| numbers(&[3], Kind::Double, at).detach().set_requires_grad(true);
                let (everywhere, sometimes, never) = (x(1), x(2), x(3));
                let params = [("everywhere", &everywhere), ("sometimes", &sometimes), ("never", &never)];
                let params = params.map(|(name, param)| (name.to_string(), param.shallow_clone()));
                let adamw = adamw(params.into());
                let mut optimizer = DistributedOptimizer::builder(adamw).world(world.clone()).build().unwrap();
                let mut loss = everywhere.sum(Kind::Double);
                if world.rank() == 0 {
                    loss += sometimes.sum(Kind::Double) * 6.0;
                }
                loss.backward();
                optimizer.step().unwrap();
                [&everywhere, &sometimes, &never].map(|param| values(&param.grad())[0])
            });
            assert!(all.iter().all(|rank| *rank == [1.0, 6.0 / size as f64, 0.0]), "{all:?}");
        }
    });
}

#[test]
fn too_many_backward_passes_are_an_error() {
    watched(|| {
        for size in SIZES {
            ranks(size, |world| {
                let mlp = Mlp::new(Kind::Double);
                let mut optimizer = builder(&world, &mlp).backward_passes_per_step(2).build().unwrap();
                let batch = local_batch(&world, Kind::Double, 0);
                (0..3).for_each(|_| mlp.loss(&batch).backward());
                let error = optimizer.step().unwrap_err().to_string();
                let expected = ["more backward passes", "pass 3", "is 2", "Call step()", "backward_passes_per_step(n)"];
                assert!(expected.iter().all(|part| error.contains(part)), "{error}");
                assert!(optimizer.synchronize().is_err(), "the error stays");
            });
        }
    });
}

#[test]
fn backward_after_synchronize_is_an_error() {
    watched(|| {
        ranks(2, |world| {
            let mlp = Mlp::new(Kind::Double);
            let mut optimizer = builder(&world, &mlp).build().unwrap();
            let batch = local_batch(&world, Kind::Double, 0);
            mlp.loss(&batch).backward();
            optimizer.synchronize().unwrap();
            mlp.loss(&batch).backward();
            let error = optimizer.step().unwrap_err().to_string();
            assert!(error.contains("after synchronize() and before step()"), "{error}");
        });
    });
}

#[test]
fn a_step_can_be_skipped_and_passes_changed_in_between() {
    watched(|| {
        ranks(2, |world| {
            let mlp = Mlp::new(Kind::Double);
            let mut optimizer = builder(&world, &mlp).build().unwrap();
            let before = values(&mlp.params[0].1);
            let batch = local_batch(&world, Kind::Double, 0);
            mlp.loss(&batch).backward();
            let in_flight = optimizer.zero_grad().unwrap_err().to_string();
            assert!(in_flight.contains("being reduced"), "{in_flight}");
            optimizer.synchronize().unwrap();
            optimizer.scale_gradients(0.5).unwrap();
            optimizer.zero_grad().unwrap();
            assert_eq!(values(&mlp.params[0].1), before);
            assert!(mlp.params.iter().all(|(_, param)| autograd::grad(param).unwrap().is_none()));

            optimizer.set_backward_passes_per_step(2);
            (0..2).for_each(|_| mlp.loss(&batch).backward());
            optimizer.step().unwrap();
            assert_ne!(values(&mlp.params[0].1), before);
            optimizer.zero_grad().unwrap();
            mlp.loss(&batch).backward();
            optimizer.set_backward_passes_per_step(3);
            let error = optimizer.step().unwrap_err().to_string();
            assert!(error.contains("from 2 to 3") && error.contains("in the middle"), "{error}");
        });
    });
}

#[test]
fn gradients_that_were_replaced_come_back_into_the_bucket() {
    watched(|| {
        for size in SIZES {
            ranks(size, |world| {
                let expected = joined_gradients(Kind::Double);
                let mlp = Mlp::new(Kind::Double);
                let mut optimizer = builder(&world, &mlp).build().unwrap();
                let address = mlp.params[0].1.grad().data_ptr();
                // Removed before backward: torch makes new tensors, the hooks take them in.
                for (_, param) in &mlp.params {
                    set_grad(param, None).unwrap();
                }
                mlp.loss(&local_batch(&world, Kind::Double, 0)).backward();
                optimizer.synchronize().unwrap();
                assert_eq!(mlp.params[0].1.grad().data_ptr(), address);
                assert!(worst(&mlp.gradients(), &expected) < 1e-15);
                optimizer.step().unwrap();

                // Replaced without any backward: synchronize takes them in; a missing one is zero.
                optimizer.zero_grad().unwrap();
                let (a, b) = (&mlp.params[0].1, &mlp.params[1].1);
                set_grad(a, Some(&(a.ones_like() * (world.rank() + 1) as f64))).unwrap();
                set_grad(b, None).unwrap();
                optimizer.synchronize().unwrap();
                assert_eq!(values(&a.grad())[0], (world.size() + 1) as f64 / 2.0);
                assert_eq!(values(&b.grad())[0], 0.0);
            });
        }
    });
}

#[test]
fn one_parameter_belongs_to_one_optimizer() {
    watched(|| {
        ranks(1, |world| {
            let mlp = Mlp::new(Kind::Double);
            let first = builder(&world, &mlp).build().unwrap();
            let error = builder(&world, &mlp).build().map(drop).unwrap_err().to_string();
            assert!(error.contains("already belongs"), "{error}");
            drop(first);
            let mut again = builder(&world, &mlp).build().unwrap();
            mlp.loss(&global_batch(Kind::Double, 0)).backward();
            again.step().unwrap();
        });
    });
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    ranks(1, |world| {
        let mlp = Mlp::new(Kind::Double);
        let refused = |builder: Builder<AdamW>| builder.build().map(drop).unwrap_err().to_string();
        assert!(refused(builder(&world, &mlp).backward_passes_per_step(0)).contains("at least 1"));
        assert!(refused(builder(&world, &mlp).bucket_bytes(0)).contains("at least 1"));
        assert!(refused(builder(&world, &mlp).op(ReduceOp::Max)).contains("averaged or summed"));
    });
}

#[test]
fn buckets_follow_the_reverse_order() {
    ranks(1, |world| {
        let mlp = Mlp::new(Kind::Double);
        let each = builder(&world, &mlp).bucket_bytes(1).build().unwrap().buckets().concat();
        assert_eq!(each, ["second.bias", "second.weight", "first.bias", "first.weight"]);
        assert_eq!(builder(&world, &mlp).build().unwrap().buckets().len(), 1);
    });
}

#[test]
fn tch_optimizers_are_wrapped_too() {
    watched(|| {
        let all = ranks(3, |world| {
            let vars = nn::VarStore::new(Device::Cpu);
            let x = vars.root().var_copy("x", &Tensor::from_slice(&[0.0f64]));
            let sgd = TchOptimizer::new(nn::sgd(0.0, 0.0, 0.0, false).build(&vars, 0.5).unwrap(), &vars).unwrap();
            let mut optimizer = DistributedOptimizer::builder(sgd).world(world.clone()).build().unwrap();
            for _ in 0..2 {
                optimizer.zero_grad().unwrap();
                (&x * -(world.rank() as f64)).sum(Kind::Double).backward();
                optimizer.step().unwrap();
            }
            values(&x)[0]
        });
        assert_eq!(all, [1.0; 3]);
    });
}

#[test]
fn gradients_from_before_count() {
    watched(|| {
        ranks(2, |world| {
            let x = Tensor::from_slice(&[0.0f64]).set_requires_grad(true);
            (&x * (world.rank() as f64)).sum(Kind::Double).backward();
            let adamw = adamw(vec![("x".into(), x.shallow_clone())]);
            let mut optimizer = DistributedOptimizer::builder(adamw).world(world.clone()).build().unwrap();
            (&x * 10.0).sum(Kind::Double).backward();
            optimizer.synchronize().unwrap();
            assert_eq!(values(&x.grad()), [10.5]);
            assert_eq!(optimizer.inner().parameters().len(), 1);
        });
    });
}

#[test]
fn ranks_with_other_parameters_are_refused() {
    watched(|| {
        let errors = ranks(2, |world| {
            let mut mlp = Mlp::new(Kind::Double);
            if world.rank() == 1 {
                mlp.params.reverse();
            }
            builder(&world, &mlp).build().map(drop).unwrap_err().to_string()
        });
        assert!(errors.iter().all(|error| error.contains("rank 1 wraps other parameters")), "{errors:?}");
    });
}

#[test]
fn gradients_in_shared_memory_are_averaged_and_outlive_the_world() {
    watched(|| {
        for (kind, bucket_bytes) in [(Kind::Float, 1 << 20), (Kind::Double, 60_000), (Kind::BFloat16, 1)] {
            let gradients = ranks_sharing(3, |world| {
                let param = |at: i64| {
                    (format!("{at}"), Tensor::ones([90, 90 + at], (kind, Device::Cpu)).set_requires_grad(true))
                };
                let params: Vec<_> = (0..3).map(param).collect();
                let own = params.iter().map(|(name, param)| (name.clone(), param.shallow_clone())).collect();
                let builder = DistributedOptimizer::builder(adamw(own)).world(world.clone());
                let mut optimizer = builder.bucket_bytes(bucket_bytes).build().unwrap();
                for step in 0..3 {
                    optimizer.zero_grad().unwrap();
                    let factor = (step + world.rank() as i64) as f64;
                    let losses = params.iter().map(|(_, param)| (param * factor).sum(Kind::Double));
                    losses.sum::<Tensor>().backward();
                    optimizer.synchronize().unwrap();
                    for (_, param) in &params {
                        let off = param.grad().to_kind(Kind::Double) - (step + 1) as f64;
                        assert_eq!(off.abs().max().double_value(&[]), 0.0);
                    }
                    optimizer.step().unwrap();
                }
                params.iter().for_each(|(_, param)| _ = param.grad().fill_(7));
                params.iter().map(|(_, param)| param.grad()).collect::<Vec<_>>()
            });
            assert!(gradients.iter().flatten().all(|grad| grad.mean(Kind::Double).double_value(&[]) == 7.0));
        }
    });
}

/// A function that adds to gradients itself finds none after `zero_grad`, and begins it where the bucket has it.
#[test]
fn gradients_begin_anew_in_the_buckets() {
    watched(|| {
        ranks(2, |world| {
            let mlp = Mlp::new(Kind::Double);
            let mut optimizer = builder(&world, &mlp).build().unwrap();
            let param = &mlp.params[0].1;
            let place = param.grad().data_ptr();
            for round in 0..3 {
                optimizer.zero_grad().unwrap();
                assert!(mlp.params.iter().all(|(_, param)| autograd::grad(param).unwrap().is_none()));
                let kept = param.shallow_clone();
                let product = tch::no_grad(|| param.sum(Kind::Double));
                let backward = move |_: &[Tensor]| {
                    autograd::accumulate(&kept, |mut grad, onto| {
                        assert_eq!(onto, Onto::Nothing, "round {round}");
                        _ = grad.f_fill_(2.0)?;
                        Ok(())
                    })?;
                    Ok(vec![Tensor::new()])
                };
                autograd::differentiate(&[param], std::slice::from_ref(&product), backward).unwrap();
                (product + (param * 3.0).sum(Kind::Double)).backward();
                optimizer.synchronize().unwrap();
                assert_eq!((param.grad() - 5.0).abs().max().double_value(&[]), 0.0);
                assert_eq!(param.grad().data_ptr(), place);
                // The others were not used: zeros, whatever was there before.
                let others = mlp.params[1..].iter().map(|(_, param)| param.grad().abs().max().double_value(&[]));
                assert_eq!(others.fold(0.0, f64::max), 0.0);
                optimizer.step().unwrap();
                mlp.params.iter().for_each(|(_, param)| _ = param.grad().fill_(f64::NAN));
            }
        });
    });
}

/// Two steps of a wrapped network with a batch for each rank; its parameters.
fn two_steps(world: &World, settings: impl Fn(Builder<AdamW>, &Mlp) -> Builder<AdamW>) -> Vec<Tensor> {
    let mlp = Mlp::new(Kind::Double);
    let mut optimizer = settings(builder(world, &mlp), &mlp).build().unwrap();
    for step in 0..2 {
        optimizer.zero_grad().unwrap();
        mlp.loss(&numbers(&[4, 8], Kind::Double, step + 10 * world.rank() as i64)).backward();
        optimizer.step().unwrap();
    }
    mlp.params.iter().map(|(_, param)| param.detach()).collect()
}

#[test]
fn groups_and_predivision_change_the_way_and_not_the_result() {
    watched(|| {
        ranks(3, |world| {
            let plain = two_steps(&world, |builder, _| builder.name("plain"));
            let others = [
                two_steps(&world, |builder, _| builder.name("numbered").num_groups(2)),
                two_steps(&world, |builder, mlp| {
                    let names: Vec<_> = mlp.params.iter().map(|(name, _)| name.clone()).collect();
                    builder.name("named").groups([vec![names[0].clone(), names[3].clone()]])
                }),
                two_steps(&world, |builder, _| builder.name("divided").gradient_predivide_factor(3.0)),
                two_steps(&world, |builder, _| builder.name("set").process_set(&world)),
            ];
            for other in others {
                for (a, b) in plain.iter().zip(&other) {
                    assert!(distance(a, b) < 1e-12);
                }
            }
        });
        ranks(1, |world| {
            let mlp = Mlp::new(Kind::Float);
            let grouped = builder(&world, &mlp).groups([vec!["second.bias", "first.bias"], vec!["first.weight"]]);
            let buckets = grouped.build().unwrap().buckets();
            assert_eq!(buckets, [vec!["second.bias", "first.bias"], vec!["second.weight"], vec!["first.weight"]]);
            let refused = |builder: Builder<AdamW>, text: &str| {
                let error = builder.build().err().expect("refused").to_string();
                assert!(error.contains(text), "{error}");
            };
            refused(builder(&world, &mlp).groups([vec!["nobody"]]), "`nobody`");
            refused(builder(&world, &mlp).groups([vec!["first.bias"], vec!["first.bias"]]), "twice");
            refused(builder(&world, &mlp).num_groups(0), "num_groups");
            refused(builder(&world, &mlp).gradient_predivide_factor(0.0), "positive");
            refused(builder(&world, &mlp).op(ReduceOp::Sum).gradient_predivide_factor(2.0), "Average");
        });
    });
}

#[test]
fn skip_synchronize_steps_with_the_gradients_as_they_are() {
    watched(|| {
        ranks(2, |world| {
            let mlp = Mlp::new(Kind::Double);
            let mut optimizer = builder(&world, &mlp).build().unwrap();
            let batch = numbers(&[4, 8], Kind::Double, world.rank() as i64);
            mlp.loss(&batch).backward();
            let early = optimizer.skip_synchronize(|optimizer| optimizer.step()).unwrap_err().to_string();
            assert!(early.contains("skip_synchronize"), "{early}");
            optimizer.synchronize().unwrap();
            let _ = tch::no_grad(|| mlp.params[0].1.grad().zero_());
            let before = mlp.params[0].1.copy();
            optimizer.skip_synchronize(|optimizer| optimizer.step()).unwrap();
            // With a gradient of zeros only the decay is left.
            assert!(distance(&(before * (1.0 - 1e-2 * 0.1)), &mlp.params[0].1) < 1e-15);
        });
    });
}

#[test]
fn adasum_combines_the_updates_of_the_ranks() {
    watched(|| {
        // With one and the same batch all updates are equal, and their adaptive sum is one of them.
        let train = |size: usize| {
            ranks(size, |world| {
                let mlp = Mlp::new(Kind::Double);
                let mut optimizer = builder(&world, &mlp).op(ReduceOp::Adasum).build().unwrap();
                for step in 0..3 {
                    optimizer.zero_grad().unwrap();
                    mlp.loss(&numbers(&[4, 8], Kind::Double, step)).backward();
                    optimizer.step().unwrap();
                }
                mlp.params.iter().map(|(_, param)| param.detach()).collect::<Vec<_>>()
            })
        };
        let (same, alone) = (train(2), train(1));
        for (together, alone) in same[0].iter().zip(&alone[0]) {
            assert!(distance(together, alone) < 1e-12);
        }
        // With different ones all ranks still hold the same parameters.
        let different = ranks(3, |world| two_steps(&world, |builder, _| builder.op(ReduceOp::Adasum)));
        for rank in &different[1..] {
            for (a, b) in rank.iter().zip(&different[0]) {
                assert_eq!(distance(a, b), 0.0);
            }
        }
    });
}
