//! Every rank gets every rank's rows; ranks may have different numbers of them.
//!
//! `mpirun -np 2 target/release/examples/allgather`

use tch::{Device, Kind, Tensor};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    // Rank r brings r + 1 rows.
    let rank = world.rank() as i64;
    let rows = Tensor::full([rank + 1, 3], rank, (Kind::Int64, Device::Cpu));
    let all = hvd_torch::allgather(&rows, "rows")?;

    let size = world.size() as i64;
    assert_eq!(all.size(), [size * (size + 1) / 2, 3]);
    assert_eq!(all.int64_value(&[-1, 0]), size - 1);
    if hvd_torch::is_main_process() {
        println!("{size} rank(s): allgather gives {} rows", all.size()[0]);
    }
    hvd_torch::shutdown()?;
    Ok(())
}
