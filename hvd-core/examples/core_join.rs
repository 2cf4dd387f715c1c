//! Ranks with uneven data: who has no more joins, and the others go on without waiting for it.
//!
//! `mpirun -np 2 target/release/examples/core_join`

use hvd_core::ReduceOp;

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    // Rank r has r + 1 steps. Step s is an average over the ranks that have it: from s on.
    for step in 0..=rank {
        let mut gradient = [rank as f32; 4];
        world.allreduce("gradient", &mut gradient, ReduceOp::Average)?;
        assert_eq!(gradient, [(step + size - 1) as f32 / 2.0; 4], "step {step}");
    }
    let last = world.join()?;
    assert_eq!(last, size - 1);
    if rank == 0 {
        println!("{size} rank(s) over {}: rank {last} had most to do", world.backend());
    }
    hvd_core::shutdown()
}
