//! Worlds on threads, and values to reduce in them.
#![allow(dead_code)] // Each test binary uses a part.

use hvd_core::config::Config;
use hvd_core::{Error, World};

pub type Outcome<T> = Result<T, Error>;

/// Runs a closure on every rank and fails on the first error of any: first of ranks that send messages, then of ranks that
/// share memory, whose results it gives.
pub fn on_ranks<R: Send>(size: usize, rank: impl Fn(&World) -> Outcome<R> + Sync) -> Vec<R> {
    on_ranks_with(size, &Config::default(), rank)
}

/// As [`on_ranks`], with settings.
pub fn on_ranks_with<R: Send>(size: usize, config: &Config, rank: impl Fn(&World) -> Outcome<R> + Sync) -> Vec<R> {
    let run = &|world: World| {
        let result = rank(&world)?;
        world.shutdown()?;
        Ok::<R, Error>(result)
    };
    for result in World::threads_with(size, config, run) {
        drop(result.expect("a rank failed"));
    }
    World::threads_sharing(size, config, run).into_iter().map(|result| result.expect("a rank failed")).collect()
}

/// A value that differs by rank and element, small enough for every sum to be exact.
pub fn value(rank: usize, element: usize) -> f64 {
    ((rank * 31 + element * 7) % 23) as f64 - 11.0
}

pub fn tensor(rank: usize, elements: usize) -> Vec<f64> {
    (0..elements).map(|element| value(rank, element)).collect()
}

/// The sum over some ranks.
pub fn sum_over(ranks: &[usize], elements: usize) -> Vec<f64> {
    (0..elements).map(|element| ranks.iter().map(|&rank| value(rank, element)).sum()).collect()
}

pub fn sum(size: usize, elements: usize) -> Vec<f64> {
    sum_over(&(0..size).collect::<Vec<_>>(), elements)
}

/// A rank's share of rows, of which the first ranks get one more.
pub fn share<T: Clone>(all: &[T], rank: usize, size: usize) -> Vec<T> {
    let (each, longer) = (all.len() / size, all.len() % size);
    let start = rank * each + rank.min(longer);
    all[start..start + each + usize::from(rank < longer)].to_vec()
}
