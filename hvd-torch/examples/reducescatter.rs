//! Each rank gets its share of the sum.
//!
//! `hvdrun -np 2 target/release/examples/reducescatter`

use hvd_torch::ReduceOp;
use tch::{Device, Kind, Tensor};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let (rank, size) = (world.rank() as i64, world.size() as i64);
    let rows = 2 * size + 1; // rank 0 gets three, the others two
    let all = Tensor::arange(rows, (Kind::Float, Device::Cpu)).view([rows, 1]) * (rank + 1);
    let mine = hvd_torch::reducescatter(&all, "shares", ReduceOp::Average)?;

    let start = if rank == 0 { 0 } else { 2 * rank + 1 };
    let count = if rank == 0 { 3 } else { 2 };
    let mean = (size + 1) as f64 / 2.0;
    let expected = (Tensor::arange(count, (Kind::Float, Device::Cpu)) + start).view([count, 1]) * mean;
    assert!(mine.allclose(&expected, 1e-6, 1e-6, false), "{mine} {expected}");
    if hvd_torch::is_main_process() {
        println!("{size} rank(s): reducescatter gives rank 0 {count} of {rows} rows");
    }
    hvd_torch::shutdown()?;
    Ok(())
}
