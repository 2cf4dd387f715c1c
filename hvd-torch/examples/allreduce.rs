//! Sums and averages of tensors over all ranks.
//!
//! `mpirun -np 2 target/release/examples/allreduce`

use hvd_torch::{Allreduce, Compression, ReduceOp};
use tch::Tensor;

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let (rank, size) = (world.rank() as f64, world.size() as f64);

    let mine = Tensor::from_slice(&[rank, 1.0]);
    let sum = hvd_torch::allreduce(&mine, "sum", ReduceOp::Sum)?;
    assert_eq!(sum, Tensor::from_slice(&[size * (size - 1.0) / 2.0, size]));

    // In place, and with 16 bits on the wire.
    let options = Allreduce::average().compression(Compression::Fp16);
    hvd_torch::allreduce_(&mine, "mean", options)?;
    assert_eq!(mine, Tensor::from_slice(&[(size - 1.0) / 2.0, 1.0]));

    let loss = hvd_torch::metric_average(rank, "loss")?;
    assert_eq!(loss, (size - 1.0) / 2.0);
    if hvd_torch::is_main_process() {
        println!("{size} rank(s) over {}: allreduce gives {:?}", world.backend(), Vec::<f64>::try_from(&sum));
    }
    hvd_torch::shutdown()?;
    Ok(())
}
