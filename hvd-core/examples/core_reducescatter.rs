//! Combines every rank's elements and leaves each rank its share of the result.
//!
//! `mpirun -np 2 target/release/examples/core_reducescatter`

use hvd_core::ReduceOp;

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    // One element more than can be shared out evenly: the first rank gets it.
    let data: Vec<_> = (0..2 * size + 1).map(|at| at as f64).collect();
    let share = world.reducescatter("sum", &data, ReduceOp::Sum)?;
    let start = if rank == 0 { 0 } else { 2 * rank + 1 };
    let expected: Vec<_> = (start..2 * rank + 3).map(|at| (at * size) as f64).collect();
    assert_eq!(share, expected);

    let mean = world.reducescatter("mean", &data, ReduceOp::Average)?;
    assert_eq!(mean, (start..2 * rank + 3).map(|at| at as f64).collect::<Vec<_>>());
    if rank == 0 {
        println!("{size} rank(s) over {}: rank 0 has {share:?}", world.backend());
    }
    hvd_core::shutdown()
}
