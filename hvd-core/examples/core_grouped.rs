//! Operations on several tensors as one: they are negotiated together, and none is carried out without the others.
//!
//! `mpirun -np 2 target/release/examples/core_grouped`

use hvd_core::ReduceOp;

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    let (mut weights, mut bias) = (vec![rank as f32; 6], vec![1.0f32; 2]);
    world.grouped_allreduce("layer", &mut [&mut weights, &mut bias], ReduceOp::Sum)?;
    assert_eq!(weights, [(size * (size - 1) / 2) as f32; 6]);
    assert_eq!(bias, [size as f32; 2]);

    let gathered = world.grouped_allgather("names", &[&[rank as i32], &vec![7; rank]])?;
    assert_eq!(gathered[0], (0..size as i32).collect::<Vec<_>>());
    assert_eq!(gathered[1], vec![7; size * (size - 1) / 2]);

    let shares = world.grouped_reducescatter("shares", &[&vec![1i64; size], &vec![2i64; 2 * size]], ReduceOp::Sum)?;
    assert_eq!(shares, [vec![size as i64], vec![2 * size as i64; 2]]);
    if rank == 0 {
        println!("{size} rank(s) over {}: groups of tensors", world.backend());
    }
    hvd_core::shutdown()
}
