//! The sum of sparse tensors with different entries on each rank.
//!
//! `hvdrun -np 2 target/release/examples/sparse_allreduce`

use hvd_torch::ReduceOp;
use tch::{Device, Kind, Tensor};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let (rank, size) = (world.rank() as i64, world.size() as i64);
    // Row 0 is everybody's, row r + 1 that of rank r alone.
    let indices = Tensor::from_slice(&[0, rank + 1]).view([1, 2]);
    let values = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
    let table =
        Tensor::sparse_coo_tensor_indices_size(&indices, &values, [size + 1, 4], (Kind::Float, Device::Cpu), false);
    let sum = hvd_torch::sparse_allreduce(&table, "table", ReduceOp::Sum)?;
    assert!(sum.is_sparse());
    let dense = sum.to_dense(None, false);
    assert_eq!(dense.double_value(&[0, 0]), size as f64);
    assert_eq!(dense.narrow(0, 1, size), Tensor::ones([size, 4], (Kind::Float, Device::Cpu)));
    if hvd_torch::is_main_process() {
        println!("{size} rank(s): sparse_allreduce gives {} rows", sum.indices().size()[1]);
    }
    hvd_torch::shutdown()?;
    Ok(())
}
