//! Saves a model and its optimizer after some updates and goes on from there, to the bit.

use std::path::Path;

use hvd_torch::{AdamW, Optimizer, ParamGroup};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use transformer_lm::checkpoint::{CheckpointState, Contents, verify};
use transformer_lm::{Config, Result, TransformerLM, load_checkpoint, save_checkpoint};

const CONFIG: &str =
    "model: {d_model: 32, n_heads: 2, n_layers: 1, d_ff: 64, max_seq_len: 16, vocab_size: 256, pad_token_id: null}";

/// A model whose first weights follow from `seed`, and its optimizer.
fn learner(config: &Config, seed: u64) -> Result<(VarStore, TransformerLM, AdamW)> {
    let store = VarStore::new(Device::Cpu);
    let model = TransformerLM::new(&store.root(), &config.model_config(256), seed)?;
    let group = ParamGroup { params: model.parameters(), lr: 1e-3, weight_decay: 0.01 };
    let optimizer = AdamW::new(vec![group], (0.9, 0.999), 1e-8)?;
    Ok((store, model, optimizer))
}

/// One update; the loss before it.
fn update(model: &TransformerLM, optimizer: &mut AdamW, batch: &Tensor) -> Result<f64> {
    optimizer.zero_grad()?;
    let (_, loss) = model.forward_t(batch, None, Some(batch), false)?;
    let loss = loss.expect("labels were given");
    loss.backward();
    optimizer.step()?;
    Ok(loss.double_value(&[]))
}

fn main() -> Result<()> {
    let config = Config::from_yaml(CONFIG, "checkpoints.rs")?;
    let batch = Tensor::arange(32, (Kind::Int64, Device::Cpu)).view([2, 16]);
    let (_store, model, mut optimizer) = learner(&config, 1)?;
    let mut loss = 0.0;
    for _ in 0..5 {
        loss = update(&model, &mut optimizer, &batch)?;
    }

    // Where training stands goes with it. An optimizer that is wrapped gives its state by `optimizer.inner().state()`.
    let state =
        CheckpointState { global_step: 5, step: 5, loss: Some(loss), seed: config.seed.0, ..Default::default() };
    let (parameters, moments) = (model.parameters(), optimizer.state()?);
    let contents =
        Contents { model: &parameters, optimizer: &moments, state: &state, config: &config, tokenizer: None };
    let path = save_checkpoint(Path::new("checkpoints"), "checkpoint_epoch1_step5", &contents)?;
    verify(&path)?; // reads every file and compares its checksum

    // Another process would make a model of the same shape, with whatever weights, and an optimizer, and load.
    let (_store, restored, mut restored_optimizer) = learner(&config, 2)?;
    let state = load_checkpoint(&path, &restored, &mut restored_optimizer)?;
    assert_eq!((state.global_step, state.loss), (5, Some(loss)));

    let next = update(&model, &mut optimizer, &batch)?;
    assert_eq!(next, update(&restored, &mut restored_optimizer, &batch)?);
    println!("update 6 has loss {next:.6} with both, from {}", path.display());
    Ok(())
}
