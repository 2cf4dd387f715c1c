//! Fits a line to points that are spread over the ranks, with gradient accumulation and clipping.
//!
//! `mpirun -np 2 target/release/examples/distributed_optimizer`

use hvd_torch::{AdamW, DistributedOptimizer, DistributedSampler, ParamGroup};
use tch::{Device, Kind, Tensor};

const POINTS: u64 = 960;
const MICRO_BATCHES: usize = 2;

fn main() -> hvd_torch::Result<()> {
    let world = hvd_torch::init()?;
    let (rank, size) = (world.rank(), world.size());

    // y = 3 x - 2; every rank knows all points, the sampler says which ones it trains on.
    let x = Tensor::arange(POINTS as i64, (Kind::Float, Device::Cpu)) / POINTS as f64;
    let y = &x * 3.0 - 2.0;
    let sampler = DistributedSampler::new(POINTS, 16 * size, rank, size, 42, true)?;

    let slope = Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let shift = Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let params = vec![("slope".to_string(), slope.shallow_clone()), ("shift".to_string(), shift.shallow_clone())];
    hvd_torch::broadcast_parameters(&params, 0)?;
    let adamw = AdamW::new(vec![ParamGroup { params, lr: 0.1, weight_decay: 0.0 }], (0.9, 0.99), 1e-8)?;
    let mut optimizer = DistributedOptimizer::builder(adamw).backward_passes_per_step(MICRO_BATCHES).build()?;

    for step in 0..300 {
        let (epoch, index) = (step / sampler.batches_per_epoch(), step % sampler.batches_per_epoch());
        let items: Vec<i64> = sampler.batch(epoch, index).into_iter().map(|item| item as i64).collect();
        optimizer.zero_grad()?;
        for micro in items.chunks(items.len() / MICRO_BATCHES) {
            let at = Tensor::from_slice(micro);
            let error = &slope * x.index_select(0, &at) + &shift - y.index_select(0, &at);
            (error.square().mean(Kind::Float) / MICRO_BATCHES as f64).backward();
        }
        optimizer.clip_grad_norm(1.0)?;
        optimizer.step()?;
        optimizer.set_lr(0.1 * (1.0 - step as f64 / 300.0));
    }

    let (slope, shift) = (slope.double_value(&[0]), shift.double_value(&[0]));
    assert!((slope - 3.0).abs() < 1e-2 && (shift + 2.0).abs() < 1e-2, "{slope} {shift}");
    if hvd_torch::is_main_process() {
        println!("{size} rank(s) found y = {slope:.3} x + {shift:.3}");
    }
    hvd_torch::shutdown()?;
    Ok(())
}
