//! Small models for tests.

#![allow(dead_code)]

pub mod python;
pub mod reference;
#[path = "../../../tests/src/skipped.rs"]
mod skipped;

use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use transformer_lm::model::random::Generator;
use transformer_lm::model::{ModelConfig, TransformerLM};

/// A shape in which no two sizes are equal.
pub fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        d_model: 8,
        n_heads: 2,
        n_layers: 3,
        d_ff: 12,
        max_seq_len: 6,
        dropout: 0.0,
        pad_token_id: Some(7),
        ..ModelConfig::default()
    }
}

/// A model whose weights and biases are all far from their first values, so that every term counts.
pub fn lively_model(config: &ModelConfig, kind: Kind) -> (VarStore, TransformerLM) {
    let mut store = VarStore::new(Device::Cpu);
    store.set_kind(kind);
    let model = TransformerLM::new(&store.root(), config, 1).unwrap();
    let mut generator = Generator::new(7, 0);
    for (_, mut parameter) in model.parameters() {
        let noise: Vec<f64> = (0..parameter.numel()).map(|_| 0.4 * generator.normal_pair().0).collect();
        let noise = Tensor::from_slice(&noise).view(&parameter.size()[..]);
        tch::no_grad(|| parameter.copy_(&(&parameter + noise)));
    }
    (store, model)
}

/// Token ids (B, T).
pub fn ids(rows: &[Vec<usize>]) -> Tensor {
    let flat: Vec<i64> = rows.iter().flatten().map(|&id| id as i64).collect();
    Tensor::from_slice(&flat).view([rows.len() as i64, rows[0].len() as i64])
}

/// The largest difference of two tensors' elements.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}
