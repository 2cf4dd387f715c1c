//! Several tensors reduced, gathered or scattered as one unit.
//!
//! `hvdrun -np 2 target/release/examples/grouped`

use hvd_torch::ReduceOp;
use tch::{Device, Kind, Tensor};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let (rank, size) = (world.rank() as i64, world.size() as i64);
    let ranks_sum = size * (size - 1) / 2;

    let (small, large) = (Tensor::from_slice(&[rank, 1]), Tensor::full([1000], rank, (Kind::Float, Device::Cpu)));
    let sums = hvd_torch::grouped_allreduce(&[&small, &large], "sums", ReduceOp::Sum)?;
    assert_eq!(sums[0], Tensor::from_slice(&[ranks_sum, size]));
    assert_eq!(sums[1].double_value(&[999]), ranks_sum as f64);

    // Rank r brings r rows of the one and a row of the other.
    let (rows, row) = (Tensor::full([rank, 2], rank, (Kind::Int64, Device::Cpu)), Tensor::from_slice(&[rank]));
    let all = hvd_torch::grouped_allgather(&[&rows, &row], "all")?;
    assert_eq!(all[0].size(), [ranks_sum, 2]);
    assert_eq!(all[1], Tensor::arange(size, (Kind::Int64, Device::Cpu)));

    // A row for each rank, and one more for rank 0.
    let rows = Tensor::full([size + 1, 3], 1.0, (Kind::Float, Device::Cpu));
    let mine = hvd_torch::grouped_reducescatter(&[&rows, &(&rows * 2.0)], "shares", ReduceOp::Sum)?;
    assert_eq!(mine[0].size(), [if rank == 0 { 2 } else { 1 }, 3]);
    assert_eq!(mine[1].double_value(&[0, 0]), 2.0 * size as f64);
    if hvd_torch::is_main_process() {
        println!("{size} rank(s): grouped operations agree");
    }
    hvd_torch::shutdown()?;
    Ok(())
}
