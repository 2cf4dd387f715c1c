//! Trains as the program `train` does, on as many ranks as the launcher started; again, and it goes on where it stopped.

use transformer_lm::trainer::Resume;
use transformer_lm::{Config, run_distributed_training, setup_horovod};

const CONFIG: &str = "
model: {d_model: 32, n_heads: 2, n_layers: 2, d_ff: 128, dropout: 0.0, max_seq_len: 32, vocab_size: auto}
training:
  max_steps: 20            # optimizer updates; without it, `epochs` decides
  global_batch_size: 8     # sequences of an update, dealt to the ranks
  learning_rate: 3.0e-3
  warmup_steps: 5
  amp_dtype: fp32          # bf16 (the default), fp16 on CUDA
  log_interval: 5
  eval_interval: 20
  save_interval: 10
data: {data_dir: data/tutorial}
paths: {checkpoint_dir: runs}
";

fn main() -> transformer_lm::Result<()> {
    let setup = setup_horovod(false)?; // without it, each training starts a world and ends it
    let mut config = Config::from_yaml(CONFIG, "training.rs")?;

    // The whole loop: deals the data, wraps the optimizer, logs, evaluates, saves.
    let first = run_distributed_training(&config, None, "tutorial")?;
    assert_eq!(first.global_step, 20);

    // `--resume auto`: the newest whole checkpoint of the newest run of this name. Ten more updates.
    config.training.max_steps = Some(30);
    let second = run_distributed_training(&config, Some(&Resume::Auto), "tutorial")?;
    assert_eq!((second.global_step, second.run.clone()), (30, first.run));

    if let Some(run) = second.run {
        // Rank 0 knows the folder: metrics.csv, metrics.jsonl, TensorBoard's files, config_used.yaml, checkpoints.
        assert!(run.join("final_model/model.safetensors").is_file());
        let loss = second.best_val_loss.unwrap_or(f64::NAN);
        println!("{} rank(s) reached {loss:.3} nats per token: {}", setup.world_size, run.display());
    }
    hvd_torch::shutdown().map_err(hvd_torch::Error::from)?;
    Ok(())
}
