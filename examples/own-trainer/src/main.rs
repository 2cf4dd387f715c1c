//! A small network learns a function, on as many ranks as `mpirun -np N` starts.

use anyhow::{Result, ensure};
use hvd_torch::{
    AdamW, DistributedOptimizer, DistributedSampler, ParamGroup, ReduceOp, named_parameters, named_variables,
};
use tch::{Device, Kind, Tensor, nn, nn::Module};

const ITEMS: i64 = 4096;
const BATCH_PER_RANK: usize = 32;
const STEPS: u64 = 300;

fn main() -> Result<()> {
    let world = hvd_torch::init()?;
    hvd_torch::set_num_threads(1); // the ranks share the cores

    // The same data on all ranks; the sampler deals it.
    hvd_torch::manual_seed(1);
    let inputs = Tensor::randn([ITEMS, 4], (Kind::Float, Device::Cpu));
    let targets = inputs.sin().sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    let sampler =
        DistributedSampler::new(ITEMS as u64, BATCH_PER_RANK * world.size(), world.rank(), world.size(), 42, true)?;

    // Each rank draws weights of its own; the broadcast makes them rank 0's.
    hvd_torch::manual_seed(100 + world.rank() as u64);
    let vars = nn::VarStore::new(Device::Cpu);
    let model = mlp(&vars.root());
    hvd_torch::broadcast_parameters(&named_variables(&vars), 0)?;

    let params = named_parameters(&vars)?;
    let adamw = AdamW::new(vec![ParamGroup { params, lr: 1e-2, weight_decay: 0.01 }], (0.9, 0.95), 1e-8)?;
    let mut optimizer = DistributedOptimizer::builder(adamw).build()?;

    let mut losses = Vec::new();
    for step in 0..STEPS {
        let (epoch, index) = (step / sampler.batches_per_epoch(), step % sampler.batches_per_epoch());
        let items: Vec<i64> = sampler.batch(epoch, index).into_iter().map(|item| item as i64).collect();
        let items = Tensor::from_slice(&items);
        let loss = model
            .forward(&inputs.index_select(0, &items))
            .mse_loss(&targets.index_select(0, &items), tch::Reduction::Mean);
        optimizer.zero_grad()?;
        loss.backward(); // while it runs, gradients that are complete already travel
        optimizer.clip_grad_norm(1.0)?;
        optimizer.step()?;

        losses.push(hvd_torch::metric_average(loss.double_value(&[]), "loss")?);
        if step % 50 == 0 && hvd_torch::is_main_process() {
            println!("step {step:3}  loss {:.4}", losses[step as usize]);
        }
    }

    let (first, last) = (losses[0], losses[STEPS as usize - 1]);
    ensure!(last < first / 4.0, "the loss went from {first} to {last}");
    for (name, param) in named_variables(&vars) {
        let least = hvd_torch::allreduce(&param, &format!("least.{name}"), ReduceOp::Min)?;
        let greatest = hvd_torch::allreduce(&param, &format!("greatest.{name}"), ReduceOp::Max)?;
        ensure!(least == greatest, "the ranks' `{name}` differ");
    }
    if hvd_torch::is_main_process() {
        println!("{} rank(s) over {}: loss {first:.4} -> {last:.4}, equal weights", world.size(), world.backend());
    }
    hvd_torch::shutdown()?;
    Ok(())
}

fn mlp(root: &nn::Path) -> nn::Sequential {
    nn::seq()
        .add(nn::linear(root / "in", 4, 64, Default::default()))
        .add_fn(|x| x.tanh())
        .add(nn::linear(root / "hidden", 64, 64, Default::default()))
        .add_fn(|x| x.tanh())
        .add(nn::linear(root / "out", 64, 1, Default::default()))
}
