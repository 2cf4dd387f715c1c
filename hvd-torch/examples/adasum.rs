//! Fits a line with Adasum: each rank updates by its own points, and the updates are combined.
//!
//! `hvdrun -np 2 target/release/examples/adasum`

use hvd_torch::{DistributedOptimizer, Optimizer, ReduceOp, TchOptimizer};
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, nn};

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let vars = nn::VarStore::new(Device::Cpu);
    let slope = vars.root().zeros("slope", &[1]);
    let sgd = TchOptimizer::new(nn::Sgd::default().build(&vars, 0.3)?, &vars)?;
    let mut optimizer = DistributedOptimizer::builder(sgd).op(ReduceOp::Adasum).build()?;

    // y = 3 x, in parts of the axis that only one rank knows.
    let x = (tch::Tensor::arange(32, (Kind::Float, Device::Cpu)) + 32.0 * world.rank() as f64)
        / (32.0 * world.size() as f64);
    for _ in 0..200 {
        optimizer.zero_grad()?;
        (&slope * &x - &x * 3.0).square().mean(Kind::Float).backward();
        optimizer.step()?;
    }
    assert_eq!(optimizer.inner().parameters().len(), 1);
    let slope = slope.double_value(&[0]);
    assert!((slope - 3.0).abs() < 1e-2, "{slope}");
    if hvd_torch::is_main_process() {
        println!("{} rank(s) with Adasum found y = {slope:.3} x", world.size());
    }
    hvd_torch::shutdown()?;
    Ok(())
}
