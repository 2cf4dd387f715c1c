//! Buffers that the runtime hands out and reduces in place, on ranks that are threads and share memory.

mod support;

use half::f16;
use hvd_core::config::Config;
use hvd_core::{Allreduce, Compression, Element, Error, ReduceOp, World};
use proptest::prelude::*;
use support::watched;

type Outcome<T> = Result<T, Error>;

fn on_ranks<R: Send>(size: usize, rank: impl Fn(&World) -> Outcome<R> + Sync) -> Vec<R> {
    let run = |world: World| {
        let result = rank(&world)?;
        world.shutdown()?;
        Ok::<R, Error>(result)
    };
    let results = World::threads_sharing(size, &Config::default(), run);
    results.into_iter().map(|result| result.expect("a rank failed")).collect()
}

/// Numbers whose sum shows in which order they were added.
fn noise(rank: usize, len: usize) -> impl Iterator<Item = f64> {
    (0..len).map(move |at| {
        let mut x = (rank as u64 + 1) << 40 ^ at as u64;
        for _ in 0..3 {
            x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        }
        x as f64 / u64::MAX as f64 - 0.5
    })
}

/// Reduces the same elements in a shared buffer and in ordinary memory: the bytes must be the same.
fn check<T: Element + PartialEq + std::fmt::Debug>(
    world: &World,
    len: usize,
    part: std::ops::Range<usize>,
    options: Allreduce,
    from: fn(f64) -> T,
) -> Outcome<()> {
    let mut shared = world.shared_buffer::<T>(len)?;
    assert!(shared.iter().all(|&element| element == T::default()), "not zeroed");
    let values: Vec<T> = noise(world.rank(), len).map(from).collect();
    shared.copy_from_slice(&values);
    let mut ordinary = values[part.clone()].to_vec();
    world.allreduce("shared", &mut shared[part.clone()], options)?;
    world.allreduce("ordinary", &mut ordinary, options)?;
    assert_eq!(shared[part.clone()], ordinary);
    assert_eq!(shared[..part.start], values[..part.start]);
    assert_eq!(shared[part.end..], values[part.end..]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_shared_buffer_gives_the_bits_of_ordinary_memory(
        ranks in 1..=5usize,
        len in prop_oneof![0..100usize, 20_000..60_000usize, Just(700_000)],
        ends in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        op in prop::sample::select(vec![ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max]),
        compressed in any::<bool>(),
        postscale in prop::sample::select(vec![1.0, 0.3]),
        dtype in 0..4,
    ) {
        let (start, end) = (ends.0.index(len + 1), ends.1.index(len + 1));
        let part = start.min(end)..start.max(end);
        let compression = if compressed { Compression::Bf16 } else { Compression::None };
        let options = Allreduce::new(op).compression(compression);
        watched(move || {
            on_ranks(ranks, |world| match dtype {
                0 => check(world, len, part.clone(), options.postscale(postscale), |x| x as f32),
                1 => check(world, len, part.clone(), options.postscale(postscale), |x| x),
                2 => check(world, len, part.clone(), options, f16::from_f64),
                _ => check(world, len, part.clone(), options, |x| (x * 1e6) as i64),
            });
        });
    }
}

#[test]
fn buckets_of_several_buffers_are_reduced_together() {
    watched(|| {
        on_ranks(3, |world| {
            let mut buffers = (0..6).map(|at| world.shared_buffer::<f32>(10_000 * at)).collect::<Outcome<Vec<_>>>()?;
            for step in 1..5 {
                let handles: Vec<_> = buffers
                    .drain(..)
                    .enumerate()
                    .map(|(at, mut buffer)| {
                        buffer.fill((step * world.rank()) as f32);
                        world.allreduce_shared_async(&format!("bucket {at}"), buffer, ReduceOp::Sum)
                    })
                    .collect::<Outcome<_>>()?;
                for handle in handles {
                    let buffer = handle.wait()?;
                    assert!(buffer.iter().all(|&x| x == (step * 3) as f32));
                    buffers.push(buffer);
                }
            }
            Ok(())
        });
    });
}

#[test]
fn ranks_that_give_different_memory_under_one_name_are_served() {
    watched(|| {
        on_ranks(3, |world| {
            let (mut one, mut other) = (world.shared_buffer::<i32>(50_000)?, world.shared_buffer::<i32>(50_000)?);
            let mut ordinary = vec![0; 50_000];
            for _ in 0..3 {
                let data: &mut [i32] = match world.rank() {
                    0 => &mut one,
                    1 => &mut other,
                    _ => &mut ordinary,
                };
                data.fill(1);
                world.allreduce("x", data, ReduceOp::Sum)?;
                assert!(data.iter().all(|&x| x == 3));
            }
            Ok(())
        });
    });
}

#[test]
fn different_lengths_are_an_error_on_every_rank_and_the_world_goes_on() {
    watched(|| {
        on_ranks(3, |world| {
            let result = world.shared_buffer::<f64>(100 + world.rank() / 2);
            assert!(matches!(result, Err(Error::Invalid(_))), "{result:?}");
            check(world, 40_000, 0..40_000, Allreduce::sum(), |x| x as f32)
        });
    });
}

/// Bytes of shared memory that this process has mapped and that have pages.
fn resident_shared_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("what the system says of this process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).expect("a line on shared memory");
    line.trim().trim_end_matches("kB").trim().parse::<usize>().expect("a number") << 10
}

#[test]
fn what_is_freed_goes_back_to_the_system_and_comes_back_zeroed() {
    watched(|| {
        let (turns, bytes) = (24, 16 << 20);
        let before = resident_shared_bytes();
        on_ranks(2, |world| {
            for _ in 0..turns {
                let mut buffer = world.shared_buffer::<u8>(bytes)?;
                for at in [0, bytes / 2, bytes - 1] {
                    assert_eq!(std::mem::replace(&mut buffer[at], 1), 0);
                }
            }
            // Other tests have buffers, too, but much smaller ones.
            assert!(
                resident_shared_bytes() < before + turns * bytes,
                "{} and before {before}",
                resident_shared_bytes()
            );
            Ok(())
        });
    });
}

#[test]
fn ranks_that_share_no_memory_get_ordinary_memory() {
    let results = World::threads(3, |world| {
        check(&world, 30_000, 5..29_000, Allreduce::average(), |x| x as f32)?;
        world.shutdown()
    });
    results.into_iter().for_each(|result: Outcome<()>| result.expect("a rank failed"));
}
