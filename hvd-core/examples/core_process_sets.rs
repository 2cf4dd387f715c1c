//! Some of the ranks work together, beside the others.
//!
//! `mpirun -np 3 target/release/examples/core_process_sets`

use hvd_core::ReduceOp;

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank(), world.size());

    // The even ranks, and the odd ones. Only its members make a set.
    let members: Vec<_> = (rank % 2..size).step_by(2).collect();
    if let Some(set) = world.process_set(&members)? {
        assert_eq!(set.ranks(), members);
        let mut sum = [rank as i64];
        set.allreduce("sum", &mut sum, ReduceOp::Sum)?;
        assert_eq!(sum[0], members.iter().sum::<usize>() as i64);

        // A root is a rank of the world; what has an entry for each rank is in the order of the set.
        let root = members[members.len() - 1];
        let mut data = [if rank == root { 2.5f32 } else { 0.0 }];
        set.broadcast("data", &mut data, root)?;
        assert_eq!(data, [2.5]);
        assert_eq!(
            set.allgather("ranks", &[rank as i32])?,
            members.iter().map(|&rank| rank as i32).collect::<Vec<_>>()
        );
    }
    world.barrier()?;

    // Sets that are known from the start are made with the world, or with the one that is there: all ranks list all of them.
    let everyone: Vec<_> = (0..size).collect();
    let sets = hvd_core::init_with_process_sets([&everyone[..], &[0]])?;
    assert!(sets[0].is_some());
    assert_eq!(sets[1].is_some(), rank == 0);
    if rank == 0 {
        println!("{size} rank(s) over {}: the even ones are {members:?}", world.backend());
    }
    hvd_core::shutdown()
}
