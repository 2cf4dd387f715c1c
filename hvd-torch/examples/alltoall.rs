//! Every rank sends some rows to every rank.
//!
//! `hvdrun -np 2 target/release/examples/alltoall`

use tch::{Device, Kind, Tensor};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let (rank, size) = (world.rank() as i64, world.size() as i64);

    // Rank r sends r + 1 rows to each rank, so that rank s gets s' + 1 rows from rank s'.
    let rows = Tensor::full([(rank + 1) * size, 2], rank, (Kind::Int64, Device::Cpu));
    let splits = vec![rank + 1; size as usize];
    let (got, received) = hvd_torch::alltoall(&rows, "uneven", Some(&splits))?;
    assert_eq!(received, (1..=size).collect::<Vec<_>>());
    assert_eq!(got.int64_value(&[-1, 0]), size - 1);

    // Without splits, equally many go to each: a transposition.
    let (column, _) =
        hvd_torch::alltoall(&(Tensor::arange(size, (Kind::Int64, Device::Cpu)) + 10 * rank), "even", None)?;
    assert_eq!(column, Tensor::arange(size, (Kind::Int64, Device::Cpu)) * 10 + rank);
    if hvd_torch::is_main_process() {
        println!("{size} rank(s): alltoall gives {received:?} rows from each");
    }
    hvd_torch::shutdown()?;
    Ok(())
}
