//! Batch normalization over the batches of all ranks.
//!
//! `hvdrun -np 2 target/release/examples/sync_batch_norm`

use hvd_torch::nn::{SyncBatchNorm, SyncBatchNormConfig};
use tch::{Device, Kind, Tensor, nn};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let vars = nn::VarStore::new(Device::Cpu);
    let layer = SyncBatchNorm::new(vars.root() / "norm", &world, 3, SyncBatchNormConfig::default());

    // Every rank's images have another brightness; together they have mean 0 and variance 1 afterwards.
    let images = Tensor::randn([4, 3, 8, 8], (Kind::Float, Device::Cpu)) + 10.0 * world.rank() as f64;
    let normal = layer.forward(&images, true)?;
    let mean = hvd_torch::metric_average(normal.mean(Kind::Float).double_value(&[]), "mean")?;
    let square = hvd_torch::metric_average(normal.square().mean(Kind::Float).double_value(&[]), "square")?;
    assert!(mean.abs() < 1e-4 && (square - 1.0).abs() < 1e-3, "{mean} {square}");
    if hvd_torch::is_main_process() {
        println!("{} rank(s): mean {mean:.6}, mean square {square:.6}", world.size());
    }
    hvd_torch::shutdown()?;
    Ok(())
}
