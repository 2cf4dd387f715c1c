//! Sums the rows of a large tensor of which each rank has a few, as of the gradient of an embedding.
//!
//! `mpirun -np 2 target/release/examples/core_sparse_allreduce`

use hvd_core::ReduceOp;

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    // Every rank has row 1000, and row `rank` that no other one has.
    let indices = [1000, rank as i64];
    let values = [1.0f32, 2.0, 10.0, 20.0];
    let (rows, sums) = world.sparse_allreduce("embedding", &indices, &values, 2, ReduceOp::Sum)?;
    assert_eq!(rows, (0..size as i64).chain([1000]).collect::<Vec<_>>());
    assert_eq!(sums[..2 * size], [10.0, 20.0].repeat(size));
    assert_eq!(sums[2 * size..], [size as f32, 2.0 * size as f32]);

    // In the background.
    let handle = world.sparse_allreduce_async("embedding", &indices, &values, 2, ReduceOp::Average)?;
    let (_, averages) = handle.wait()?;
    assert_eq!(averages[2 * size..], [1.0, 2.0]);
    if rank == 0 {
        println!("{size} rank(s) over {}: rows {rows:?}", world.backend());
    }
    hvd_core::shutdown()
}
