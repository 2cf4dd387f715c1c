//! Combines every rank's elements with each of the elementwise operations.
//!
//! `mpirun -np 2 target/release/examples/core_allreduce`

use hvd_core::{Allreduce, Compression, ReduceOp};

fn main() -> hvd_core::Result<()> {
    let world = hvd_core::init()?;
    let (rank, size) = (world.rank() as i64, world.size() as i64);

    // Rank r contributes r + 1, so that products are not zero.
    for (op, expected) in [
        (ReduceOp::Sum, size * (size + 1) / 2),
        (ReduceOp::Average, (size + 1) / 2), // integers floor
        (ReduceOp::Min, 1),
        (ReduceOp::Max, size),
        (ReduceOp::Product, (1..=size).product()),
    ] {
        let mut data = [rank + 1, rank + 1];
        world.allreduce("integers", &mut data, op)?;
        assert_eq!(data, [expected; 2], "{op:?}");
    }

    // Scaled, and with 16 bits on the wire.
    let mut data = vec![rank as f32; 1000];
    let options = Allreduce::sum().prescale(0.5).postscale(4.0).compression(Compression::Bf16);
    world.allreduce("floats", &mut data, options)?;
    assert_eq!(data, vec![(size * (size - 1)) as f32; 1000]);

    // In the background: several are under way at once, and small ones travel together.
    let submit =
        |index: usize| world.allreduce_async(&format!("layer.{index}"), vec![index as f32; 100], ReduceOp::Average);
    let handles: Vec<_> = (0..10).map(submit).collect::<Result<_, _>>()?;
    for (index, handle) in handles.into_iter().enumerate() {
        assert_eq!(handle.wait()?, vec![index as f32; 100]);
    }
    if rank == 0 {
        println!("{size} rank(s) over {}: every operation gives what it should", world.backend());
    }
    hvd_core::shutdown()
}
