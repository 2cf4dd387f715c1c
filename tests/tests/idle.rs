//! A world in which nothing is submitted costs next to nothing, whatever connects its ranks.
//!
//! One test alone, so that nothing else uses the processor time of this process.

use std::time::Duration;

use hvd_core::{ReduceOp, World};
use hvd_tests::{Job, Launcher, binary, mpi_plugin};
use hvd_tools::perf::share_while_idle;

/// Of a core, for each rank.
const MOST_PERCENT: f64 = 1.0;

/// What the busiest of three idle ranks uses.
fn percent_of_a_core(backend: &str, launcher: Launcher) -> f64 {
    let args = ["allreduce", "-b", "4K", "-e", "4K", "--iters", "3", "--json", "--idle", "2", "--backend", backend];
    let job = Job::new(binary("hvd-perf"), 3).args(args).launcher(launcher);
    let finished = job.run();
    let last = finished.assert_success().stdout.lines().last().expect("rows").to_string();
    let row: serde_json::Value = serde_json::from_str(&last).expect("a row of JSON");
    row["percent_of_a_core"].as_f64().expect("the share of a core")
}

/// What ranks that are threads of this process use together.
fn percent_of_threads(ranks: usize, share: bool) -> f64 {
    let idle = |world: World| {
        world.allreduce("once", &mut [1.0f32], ReduceOp::Sum).expect("a sum");
        let used = share_while_idle(&world, Duration::from_secs(2)).expect("the processor time of this process");
        world.shutdown().expect("a peaceful end");
        100.0 * used
    };
    let config = Default::default();
    let used = if share { World::threads_sharing(ranks, &config, idle) } else { World::threads(ranks, idle) };
    used[0]
}

#[test]
fn an_idle_world_uses_less_than_one_percent_of_a_core_per_rank() {
    for (backend, launcher) in [("shm", Launcher::Spawn), ("tcp", Launcher::Spawn), ("mpi", Launcher::OpenMpi)] {
        if backend == "mpi" && (mpi_plugin().is_none() || !launcher.is_available()) {
            continue;
        }
        let percent = percent_of_a_core(backend, launcher);
        assert!(percent < MOST_PERCENT, "{backend}: {percent} %");
    }
    for share in [false, true] {
        let percent = percent_of_threads(3, share);
        assert!(percent < 3.0 * MOST_PERCENT, "three threads, sharing memory: {share}: {percent} %");
    }
}
