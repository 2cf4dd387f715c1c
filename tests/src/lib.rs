//! Starts jobs of several processes and watches over them: a job that does not end in time is killed and fails its test.
//!
//! Tests here run what users run: the built binaries, under `mpirun` or started one by one.
#![deny(missing_docs)]

pub mod conformance;
mod hosts;
mod job;
mod launcher;
mod skipped;

pub use hosts::{Cut, Hosts, run};
pub use job::{Finished, Job, Running};
pub use launcher::{Launcher, binary, mpi_plugin};
pub use skipped::skipped;

use std::sync::OnceLock;

/// A seed for a test's random choices: from `HVD_TEST_SEED`, else of the moment. Printed, so that a failure can be
/// repeated.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let given = std::env::var("HVD_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let now =
            || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let seed = given.unwrap_or_else(now);
        eprintln!("HVD_TEST_SEED={seed}");
        seed
    })
}
