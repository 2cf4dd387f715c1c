//! A small network learns a wave, on as many ranks as it is started with.

use std::error::Error;

use hvd_torch::{AdamW, DistributedOptimizer, DistributedSampler, ParamGroup, named_parameters, named_variables};
use tch::nn::{self, Module};
use tch::{Device, Kind, Reduction, Tensor};

const POINTS: i64 = 4096;
const BATCH: usize = 32; // of each rank
const EPOCHS: u64 = 10;

fn main() -> Result<(), Box<dyn Error>> {
    let world = hvd_torch::init()?;
    let x = Tensor::linspace(-3, 3, POINTS, (Kind::Float, Device::Cpu)).unsqueeze(1); // (POINTS, 1)
    let y = x.sin();

    let vars = nn::VarStore::new(Device::Cpu);
    let network = network(&vars.root());
    // Every rank drew weights of its own: all start from those of rank 0.
    hvd_torch::broadcast_parameters(&named_variables(&vars), 0)?;
    let group = ParamGroup { params: named_parameters(&vars)?, lr: 5e-3, weight_decay: 0.01 };
    let adamw = AdamW::new(vec![group], (0.9, 0.999), 1e-8)?;
    let mut optimizer = DistributedOptimizer::builder(adamw).build()?;

    // Items are dealt in global batches: the ranks' batches together.
    let (rank, size) = (world.rank(), world.size());
    let sampler = DistributedSampler::new(POINTS as u64, BATCH * size, rank, size, 1, true)?;
    let (mut first, mut loss) = (f64::NAN, f64::NAN);
    for epoch in 0..EPOCHS {
        let mut sum = 0.0;
        for batch in 0..sampler.batches_per_epoch() {
            let items: Vec<i64> = sampler.batch(epoch, batch).into_iter().map(|item| item as i64).collect();
            let items = Tensor::from_slice(&items); // this rank's share of the global batch
            let output = network.forward(&x.index_select(0, &items));
            let error = output.mse_loss(&y.index_select(0, &items), Reduction::Mean);
            optimizer.zero_grad()?;
            error.backward(); // gradients are averaged over the ranks while it runs
            optimizer.clip_grad_norm(1.0)?; // of the averaged gradients
            optimizer.step()?;
            sum += error.double_value(&[]);
        }
        loss = hvd_torch::metric_average(sum / sampler.batches_per_epoch() as f64, "loss")?;
        first = if epoch == 0 { loss } else { first };
        if hvd_torch::is_main_process() {
            println!("epoch {epoch}: loss {loss:.5} on {size} ranks");
        }
    }

    assert!(loss < first / 4.0, "it should have learnt the wave, but its loss went from {first} to {loss}");
    assert_same_bits(&vars)?;
    hvd_torch::shutdown()?;
    Ok(())
}

fn network(path: &nn::Path) -> nn::Sequential {
    let first = nn::linear(path / "first", 1, 64, Default::default());
    let second = nn::linear(path / "second", 64, 1, Default::default());
    nn::seq().add(first).add_fn(|hidden| hidden.tanh()).add(second)
}

/// After the same steps, all ranks hold the same weights, bit by bit.
fn assert_same_bits(vars: &nn::VarStore) -> Result<(), Box<dyn Error>> {
    for (name, weight) in named_variables(vars) {
        let all = hvd_torch::allgather(&weight.detach().unsqueeze(0), &name)?; // (ranks, …)
        assert!(all.eq_tensor(&all.get(0)).all().int64_value(&[]) == 1, "{name} differs between ranks");
    }
    Ok(())
}
