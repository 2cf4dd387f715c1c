//! Gives all ranks what one of them has: elements, and any value that serde can write.
//!
//! `mpirun -np 2 target/release/examples/core_broadcast`

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    let root = size - 1;
    let mut data = if rank == root { [3.5f64, -1.0] } else { [0.0; 2] };
    world.broadcast("data", &mut data, root)?;
    assert_eq!(data, [3.5, -1.0]);

    let seed = (rank == 0).then(|| ("run".to_owned(), 42u64));
    let (name, seed) = world.broadcast_object("settings", seed, 0)?;
    assert_eq!((name.as_str(), seed), ("run", 42));
    if rank == 0 {
        println!("{size} rank(s) over {}: all have {data:?}", world.backend());
    }
    hvd_core::shutdown()
}
