//! A training loop of one's own around the model, on any number of ranks.

use hvd_torch::{AdamW, Compression, DistributedOptimizer, ParamGroup};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use transformer_lm::{ModelConfig, Result, TransformerLM, setup_horovod};

fn main() -> Result<()> {
    // Finds the other ranks and deals the host's cores to its ranks; `true` would refuse to run alone.
    let setup = setup_horovod(false)?;
    let (rank, size) = (hvd_torch::rank().map_err(hvd_torch::Error::from)?, setup.world_size);
    let device = if setup.cuda { Device::Cuda(setup.local_rank) } else { Device::Cpu };

    let shape =
        ModelConfig { vocab_size: 64, d_model: 32, n_heads: 2, n_layers: 1, d_ff: 64, ..ModelConfig::default() };
    let store = VarStore::new(device);
    let model = TransformerLM::new(&store.root(), &shape, 1 + rank as u64)?; // other weights on each rank
    hvd_torch::broadcast_parameters(&model.parameters(), 0)?; // now those of rank 0 on all

    let group = ParamGroup { params: model.parameters(), lr: 1e-2, weight_decay: 0.0 };
    let adamw = AdamW::new(vec![group], (0.9, 0.999), 1e-8)?;
    let mut optimizer = DistributedOptimizer::builder(adamw)
        .backward_passes_per_step(2) // two micro-batches an update
        .compression(Compression::None) // or Fp16, Bf16: on the wire only
        .build()?;

    let mut loss = f64::NAN;
    for step in 0..10 {
        optimizer.zero_grad()?;
        let mut sum = 0.0;
        for micro in 0..2 {
            let batch = Tensor::arange(32, (Kind::Int64, device)).view([2, 16]) + (rank as i64 + step + micro) % 8;
            let (_, loss) = model.forward_t(&batch, None, Some(&batch), false)?;
            let loss = loss.expect("labels were given") / 2.0;
            loss.backward(); // gradients travel while it runs
            sum += loss.double_value(&[]);
        }
        optimizer.clip_grad_norm(1.0)?; // waits for them, and clips what all ranks agreed on
        optimizer.step()?;
        loss = hvd_torch::metric_average(sum, "loss")?;
    }
    assert!(loss < 4.0, "{loss}"); // ln 64 is 4.16

    if hvd_torch::is_main_process() {
        println!("loss {loss:.3}, the mean over {size} ranks");
    }
    hvd_torch::shutdown().map_err(hvd_torch::Error::from)?;
    Ok(())
}
