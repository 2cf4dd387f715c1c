//! Gathers every rank's elements, of which each has a different number, on all ranks.
//!
//! `mpirun -np 2 target/release/examples/core_allgather`

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    // Rank r has r elements: rank 0 none.
    let gathered = world.allgather("ranks", &vec![rank as i32; rank])?;
    let expected: Vec<_> = (0..size).flat_map(|rank| vec![rank as i32; rank]).collect();
    assert_eq!(gathered, expected);
    if rank == 0 {
        println!("{size} rank(s) over {}: gathered {gathered:?}", world.backend());
    }
    hvd_core::shutdown()
}
