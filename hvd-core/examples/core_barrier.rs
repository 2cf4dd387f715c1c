//! No rank goes on before all ranks have come.
//!
//! `mpirun -np 2 target/release/examples/core_barrier`

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds of the clock that the ranks of one host share.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64)
}

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    let came = now();
    world.barrier()?;
    let went = now();
    let (came, went) = (world.allgather("came", &[came])?, world.allgather("went", &[went])?);
    assert!(came.iter().max() <= went.iter().min(), "came {came:?}, went {went:?}");

    let waiting = world.barrier_async()?;
    waiting.wait()?;
    if rank == 0 {
        println!("{size} rank(s) over {}: all have met", world.backend());
    }
    hvd_core::shutdown()
}
