//! The engine from outside: ranks that are threads submit, and must get what a plain computation gives.

use std::sync::{Arc, Mutex};

use hvd_core::config::Config;
use hvd_core::{
    Allreduce, Compression, DType, Error, Memory, Observer, OpKind, Output, Phase, ReduceOp, Submission, World,
};
use proptest::prelude::*;

type Outcome<T> = Result<T, Error>;

/// Runs a closure on every rank and fails on the first error of any.
fn on_ranks<R: Send>(size: usize, config: &Config, rank: impl Fn(&World) -> Outcome<R> + Sync) -> Vec<R> {
    let run = |world: World| {
        let result = rank(&world)?;
        world.shutdown()?;
        Ok::<R, Error>(result)
    };
    World::threads_with(size, config, run).into_iter().map(|result| result.expect("a rank failed")).collect()
}

/// A value that differs by rank and element, small enough for every sum to be exact.
fn value(rank: usize, element: usize) -> f32 {
    ((rank * 31 + element * 7) % 23) as f32 - 11.0
}

fn tensor(rank: usize, elements: usize) -> Vec<f32> {
    (0..elements).map(|element| value(rank, element)).collect()
}

fn sum(size: usize, elements: usize) -> Vec<f32> {
    (0..elements).map(|element| (0..size).map(|rank| value(rank, element)).sum()).collect()
}

#[test]
fn every_operation_on_every_world_size() {
    for size in 1..=9 {
        on_ranks(size, &Config::default(), |world| {
            let rank = world.rank();
            let mut data = tensor(rank, 1000);
            world.allreduce("sum", &mut data, ReduceOp::Sum)?;
            assert_eq!(data, sum(size, 1000));

            let root = size - 1;
            let mut data = tensor(rank, 300);
            world.broadcast("broadcast", &mut data, root)?;
            assert_eq!(data, tensor(root, 300));

            let gathered = world.allgather("gather", &tensor(rank, rank))?;
            let expected: Vec<f32> = (0..size).flat_map(|rank| tensor(rank, rank)).collect();
            assert_eq!(gathered, expected);
            world.barrier()
        });
    }
}

#[test]
fn averages_of_integers_floor() {
    let results = on_ranks(2, &Config::default(), |world| {
        let mut data = vec![world.rank() as i64 + 1, -(world.rank() as i64) - 1];
        world.allreduce("mean", &mut data, ReduceOp::Average)?;
        Ok(data)
    });
    assert_eq!(results, vec![vec![1, -2]; 2]);
}

#[test]
fn an_average_that_travels_in_fp16_does_not_overflow() {
    let options = Allreduce::average().compression(Compression::Fp16);
    for elements in [3, 50_000] {
        on_ranks(5, &Config::default(), |world| {
            let mut data = vec![60_000.0f32; elements];
            world.allreduce("large", &mut data, options)?;
            data.iter().for_each(|&x| assert!((x - 60_000.0).abs() <= 64.0, "{x}"));
            Ok(())
        });
    }
}

#[test]
fn scale_factors_apply_before_and_after() {
    on_ranks(3, &Config::default(), |world| {
        let mut data = vec![1.0f64; 10];
        world.allreduce("scaled", &mut data, Allreduce::sum().prescale(0.5).postscale(4.0))?;
        assert_eq!(data, [6.0; 10]);
        Ok(())
    });
}

#[test]
fn ranks_may_submit_in_different_orders() {
    on_ranks(4, &Config::default(), |world| {
        let count = 50;
        // 7 and 50 have no common factor: each rank submits all names, each in its own order.
        let order = (0..count).map(|i| (i * 7 + world.rank() * 13) % count);
        let handles: Vec<_> = order
            .map(|i| Ok((i, world.allreduce_async(&format!("t{i}"), tensor(world.rank(), 10 * i), ReduceOp::Sum)?)))
            .collect::<Outcome<_>>()?;
        for (i, handle) in handles {
            assert_eq!(handle.wait()?, sum(4, 10 * i));
        }
        Ok(())
    });
}

#[test]
fn a_small_cache_and_no_cache_give_the_same() {
    for cache_capacity in [0, 1, 3, 1024] {
        let config = Config { cache_capacity, ..Config::default() };
        on_ranks(3, &config, |world| {
            for step in 0..20 {
                let handles: Vec<_> = (0..6)
                    .map(|i| world.allreduce_async(&format!("t{i}"), tensor(world.rank() + step, 100), ReduceOp::Sum))
                    .collect::<Outcome<_>>()?;
                for handle in handles {
                    let expected: Vec<f32> = (0..100).map(|e| (0..3).map(|rank| value(rank + step, e)).sum()).collect();
                    assert_eq!(handle.wait()?, expected);
                }
            }
            Ok(())
        });
    }
}

#[test]
fn a_name_may_change_its_shape_from_step_to_step() {
    on_ranks(3, &Config::default(), |world| {
        for elements in [5, 5, 6, 6, 5, 0, 1000] {
            let mut data = tensor(world.rank(), elements);
            world.allreduce("changing", &mut data, ReduceOp::Sum)?;
            assert_eq!(data, sum(3, elements));
            let gathered = world.allgather("rows", &tensor(0, elements * world.rank()))?;
            assert_eq!(gathered.len(), elements * 3);
        }
        Ok(())
    });
}

/// What the ranks submit under one name, and what the error must say.
#[test]
fn a_disagreement_is_an_error_on_every_rank_and_the_engine_goes_on() {
    let submit = |world: &World, kind, dtype: DType, shape: Vec<usize>| {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let output = match kind {
            OpKind::Allgather => Output::Allocate(Box::new(Memory::zeroed)),
            _ => Output::InPlace,
        };
        let submission = Submission::new("odd", kind, dtype, shape, Memory::zeroed(bytes), output);
        world.submit(submission)?.wait()
    };
    let sum = OpKind::Allreduce(Allreduce::sum());
    let cases: Vec<(&str, OpKind, DType, Vec<usize>)> = vec![
        ("shape", sum.clone(), DType::F32, vec![5]),
        ("rank of the shape", sum.clone(), DType::F32, vec![2, 2]),
        ("dtype", sum.clone(), DType::F64, vec![4]),
        ("op", OpKind::Allreduce(ReduceOp::Max.into()), DType::F32, vec![4]),
        ("scale", OpKind::Allreduce(Allreduce::sum().prescale(2.0)), DType::F32, vec![4]),
        ("compression", OpKind::Allreduce(Allreduce::sum().compression(Compression::Bf16)), DType::F32, vec![4]),
        ("kind", OpKind::Broadcast { root: 0 }, DType::F32, vec![4]),
        ("kind and size", OpKind::Allgather, DType::F32, vec![4]),
    ];
    on_ranks(3, &Config::default(), |world| {
        for (what, kind, dtype, shape) in &cases {
            // Agreed on before, so that the disagreement must get past the cache.
            submit(world, sum.clone(), DType::F32, vec![4])?;
            let result = match world.rank() {
                1 => submit(world, kind.clone(), *dtype, shape.clone()),
                _ => submit(world, sum.clone(), DType::F32, vec![4]),
            };
            match result {
                Err(Error::Mismatch { name, detail }) => {
                    assert_eq!(name, "odd");
                    assert!(detail.starts_with("ranks 0, 2 sent allreduce(Sum) of f32 [4]; rank 1 sent "), "{detail}");
                }
                other => panic!("{what}: expected a mismatch, got {other:?}"),
            }
            let mut data = [world.rank() as f32];
            world.allreduce("fine", &mut data, ReduceOp::Sum)?;
            assert_eq!(data, [3.0]);
        }
        let result = submit(world, OpKind::Broadcast { root: world.rank() % 2 }, DType::F32, vec![4]);
        assert!(matches!(&result, Err(Error::Mismatch { detail, .. }) if detail.contains("root 1")), "{result:?}");
        Ok(())
    });
}

#[test]
fn what_no_rank_could_do_is_refused_at_once() {
    for size in [1, 2] {
        on_ranks(size, &Config::default(), |world| {
            let refused = |result: Outcome<()>, text: &str| match result {
                Err(Error::Invalid(detail)) => assert!(detail.contains(text), "{detail}"),
                other => panic!("{text}: {other:?}"),
            };
            refused(world.allreduce("a", &mut [true], ReduceOp::Sum), "not defined for bool");
            refused(world.allreduce("b", &mut [1u8], ReduceOp::Product), "not defined for u8");
            refused(world.allreduce("c", &mut [1i32], Allreduce::sum().prescale(0.5)), "need floats");
            refused(world.allreduce("d", &mut [1f32], Allreduce::sum().prescale(f64::NAN)), "finite");
            refused(world.broadcast("e", &mut [1f32], 7), "root 7");
            let too_large = vec![usize::MAX, 2];
            let wrong = Submission::new("f", OpKind::Barrier, DType::F32, too_large, Memory::empty(), Output::InPlace);
            refused(world.submit(wrong).map(drop), "does not take");
            Ok(())
        });
    }
}

#[test]
fn a_name_can_be_waiting_only_once() {
    on_ranks(2, &Config::default(), |world| {
        if world.rank() == 0 {
            let first = world.allreduce_async("twice", vec![1.0f32], ReduceOp::Sum)?;
            let second = world.allreduce_async("twice", vec![1.0f32], ReduceOp::Sum)?;
            assert!(matches!(second.wait(), Err(Error::Invalid(text)) if text.contains("twice")));
            world.barrier()?;
            assert_eq!(first.wait()?, [2.0]);
        } else {
            world.barrier()?;
            let mut data = [1.0f32];
            world.allreduce("twice", &mut data, ReduceOp::Sum)?;
        }
        Ok(())
    });
}

#[test]
fn objects_of_different_sizes() {
    on_ranks(3, &Config::default(), |world| {
        let own = vec![format!("rank {}", world.rank()); world.rank()];
        let all: Vec<Vec<String>> = world.allgather_object("objects", &own)?;
        assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(all[2], ["rank 2", "rank 2"]);
        let told: Vec<String> = world.broadcast_object("told", (world.rank() == 2).then_some(own), 2)?;
        assert_eq!(told.len(), 2);
        let missing: Outcome<u8> = world.broadcast_object("missing", None, 1);
        assert!(matches!(missing, Err(Error::Invalid(_))), "{missing:?}");
        Ok(())
    });
}

#[test]
fn shutting_down_ends_what_not_all_ranks_submitted() {
    World::threads(2, |world| {
        let lonely = (world.rank() == 0).then(|| world.allreduce_async("lonely", vec![1.0f32], ReduceOp::Sum));
        world.shutdown().expect("a peaceful end");
        if let Some(handle) = lonely {
            let result = handle.and_then(|handle| handle.wait());
            assert!(matches!(result, Err(Error::ShutDown(_))), "{result:?}");
        }
        let late = world.barrier();
        assert!(matches!(late, Err(Error::ShutDown(_))), "{late:?}");
    });
}

#[test]
fn a_rank_that_leaves_is_named_on_all_others() {
    for size in [2, 3, 5] {
        let results = World::threads(size, |world| {
            if world.rank() == 1 {
                return Ok(());
            }
            world.barrier()
        });
        for (rank, result) in results.into_iter().enumerate().filter(|(rank, _)| *rank != 1) {
            assert!(matches!(&result, Err(Error::PeerLost { rank: 1, .. })), "rank {rank}: {result:?}");
        }
    }
}

#[test]
fn a_rank_that_aborts_gives_the_cause() {
    let results = World::threads(3, |world| {
        if world.rank() == 2 {
            world.abort("out of coffee");
        }
        world.allreduce("data", &mut [1.0f32], ReduceOp::Sum)
    });
    for result in results {
        let text = result.expect_err("the world is lost").to_string();
        assert!(text.contains("rank 2") && text.contains("out of coffee"), "{text}");
    }
}

#[test]
fn many_threads_of_one_rank_may_wait_at_once() {
    on_ranks(2, &Config::default(), |world| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|thread| {
                    scope.spawn(move || {
                        for step in 0..50 {
                            let mut data = [thread as f32, step as f32];
                            world.allreduce(&format!("thread {thread}"), &mut data, ReduceOp::Sum)?;
                            assert_eq!(data, [2.0 * thread as f32, 2.0 * step as f32]);
                        }
                        Ok::<(), Error>(())
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
        })
    });
}

/// Writes down every station.
#[derive(Default)]
struct Diary(Mutex<Vec<(String, Phase)>>);

impl Observer for Diary {
    fn event(&self, tensor: &str, phase: Phase) {
        self.0.lock().expect("no panic").push((tensor.into(), phase));
    }
}

#[test]
fn an_observer_hears_of_every_station_in_order() {
    on_ranks(2, &Config::default(), |world| {
        let diary = Arc::new(Diary::default());
        world.set_observer(Some(diary.clone()));
        world.allreduce("seen", &mut [1.0f32], ReduceOp::Sum)?;
        world.set_observer(None);
        world.allreduce("unseen", &mut [1.0f32], ReduceOp::Sum)?;
        let seen = diary.0.lock().expect("no panic").clone();
        let expected = [Phase::Submitted, Phase::Negotiated, Phase::CopyIn, Phase::Wire, Phase::CopyOut, Phase::Done];
        assert_eq!(seen, expected.map(|phase| ("seen".to_string(), phase)));
        Ok(())
    });
}

/// Sums whose bits depend on the order of summation.
fn fragile(rank: usize, elements: usize, seed: u32) -> Vec<f32> {
    let mut state = seed ^ (rank as u32).wrapping_mul(0x9E37_79B9);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from_bits(0x3000_0000 + (state >> 8) % 0x1800_0000)
    };
    (0..elements).map(|_| next()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Alone or fused with neighbours, in whatever order they come: the same bits on all ranks.
    #[test]
    fn bits_do_not_depend_on_fusion(
        size in 2usize..=6,
        lengths in prop::collection::vec(0usize..9000, 1..8),
        threshold in prop::sample::select(vec![0usize, 1 << 10, 1 << 24]),
        compression in prop::sample::select(vec![Compression::None, Compression::Bf16]),
        seed: u32,
    ) {
        let options = Allreduce::average().compression(compression);
        let alone = on_ranks(size, &Config::default(), |world| {
            let reduce = |(i, &elements): (usize, &usize)| {
                let mut data = fragile(world.rank(), elements, seed ^ i as u32);
                world.allreduce(&format!("t{i}"), &mut data, options)?;
                Ok(data)
            };
            lengths.iter().enumerate().map(reduce).collect::<Outcome<Vec<_>>>()
        });
        let config = Config { fusion_threshold_bytes: threshold, ..Config::default() };
        let together = on_ranks(size, &config, |world| {
            let submit = |(i, &elements): (usize, &usize)| {
                world.allreduce_async(&format!("t{i}"), fragile(world.rank(), elements, seed ^ i as u32), options)
            };
            let mut handles = lengths.iter().enumerate().map(submit).collect::<Outcome<Vec<_>>>()?;
            handles.drain(..).map(|handle| handle.wait()).collect::<Outcome<Vec<_>>>()
        });
        for rank in 0..size {
            prop_assert_eq!(&alone[rank], &alone[0]);
            prop_assert_eq!(&together[rank], &alone[0]);
        }
    }
}
