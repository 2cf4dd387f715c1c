//! Adasum: adds what is different in the ranks' gradients and averages what is the same.
//!
//! `mpirun -np 2 target/release/examples/core_adasum`

use hvd_core::ReduceOp;

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    // All ranks agree: the result is what each of them has.
    let mut agreed = [1.0f32, -2.0, 0.5];
    world.allreduce("agreed", &mut agreed, ReduceOp::Adasum)?;
    assert_eq!(agreed, [1.0, -2.0, 0.5]);

    // Each rank has an element of its own, so that no two vectors have anything in common: the result is their sum.
    let mut apart = vec![0.0f32; size];
    apart[rank] = rank as f32 + 1.0;
    world.allreduce("apart", &mut apart, ReduceOp::Adasum)?;
    assert_eq!(apart, (1..=size).map(|x| x as f32).collect::<Vec<_>>());
    if rank == 0 {
        println!("{size} rank(s) over {}: Adasum gives {agreed:?} and {apart:?}", world.backend());
    }
    hvd_core::shutdown()
}
