//! Ranks with uneven data: who is done waits in `join` while the others go on.
//!
//! `hvdrun -np 2 target/release/examples/join`

use hvd_torch::ReduceOp;
use tch::Tensor;

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    // Rank r has r + 1 batches.
    for batch in 0..=world.rank() {
        let mean = hvd_torch::allreduce(&Tensor::from_slice(&[batch as f32]), "batch", ReduceOp::Average)?;
        assert_eq!(mean.double_value(&[0]), batch as f64);
    }
    let last = hvd_torch::join()?;
    assert!(last < world.size());
    if hvd_torch::is_main_process() {
        println!("{} rank(s): rank {last} joined last", world.size());
    }
    hvd_torch::shutdown()?;
    Ok(())
}
