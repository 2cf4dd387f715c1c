//! Each rank has a block of elements for every rank.
//!
//! `mpirun -np 2 target/release/examples/core_alltoall`

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    // Equal blocks: one element for each rank.
    let data: Vec<_> = (0..size).map(|to| (10 * rank + to) as i32).collect();
    let (blocks, lengths) = world.alltoall("equal", &data, None)?;
    assert_eq!(blocks, (0..size).map(|from| (10 * from + rank) as i32).collect::<Vec<_>>());
    assert_eq!(lengths, vec![1; size]);

    // Rank r has r + t elements for rank t: rank 0 has none for itself.
    let splits: Vec<_> = (0..size).map(|to| rank + to).collect();
    let data = vec![rank as f32; splits.iter().sum()];
    let (blocks, lengths) = world.alltoall("uneven", &data, Some(&splits))?;
    assert_eq!(lengths, (0..size).map(|from| from + rank).collect::<Vec<_>>());
    assert_eq!(blocks, (0..size).flat_map(|from| vec![from as f32; from + rank]).collect::<Vec<_>>());
    if rank == 0 {
        println!("{size} rank(s) over {}: rank 0 got {blocks:?}", world.backend());
    }
    hvd_core::shutdown()
}
