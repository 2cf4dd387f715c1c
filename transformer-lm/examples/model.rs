//! Makes a small model, asks it for logits and a loss, and lets it continue two sequences.

use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use transformer_lm::model::GenerationParams;
use transformer_lm::model::sampling::Sampling;
use transformer_lm::{ModelConfig, TransformerLM};

fn main() -> transformer_lm::Result<()> {
    let shape = ModelConfig {
        vocab_size: 256,
        d_model: 64,
        n_heads: 4,
        n_layers: 2,
        d_ff: 256,
        max_seq_len: 32,
        dropout: 0.1,
        pad_token_id: Some(0),
        gradient_checkpointing: false,
        ..ModelConfig::default()
    };
    let store = VarStore::new(Device::Cpu); // owns the parameters; a `VarStore` of a CUDA device puts them there
    let model = TransformerLM::new(&store.root(), &shape, 42)?; // 42: the seed of its first weights
    println!("{} parameters in {} tensors", shape.parameter_count(), model.parameters().len());

    // Two sequences of 16 tokens; the second one's last 6 are padding: nobody looks at them, and they have no part in the loss.
    let input_ids = Tensor::randint(256, [2, 16], (Kind::Int64, Device::Cpu)); // (B, T)
    let attention_mask = Tensor::ones([2, 16], (Kind::Int64, Device::Cpu));
    let _ = attention_mask.get(1).narrow(0, 10, 6).fill_(0);
    let labels = input_ids.masked_fill(&attention_mask.eq(0), -100); // shifted inside, as in transformers

    let (logits, loss) = model.forward_t(&input_ids, Some(&attention_mask), Some(&labels), true)?; // true: with dropout
    assert_eq!(logits.size(), [2, 16, 256]); // (B, T, vocabulary)
    let loss = loss.expect("labels were given"); // mean over the labels that are not -100, in nats
    loss.backward();
    println!("loss {:.3} of a model that knows nothing; ln 256 is {:.3}", loss.double_value(&[]), 256f64.ln());

    let params = GenerationParams {
        max_new_tokens: 8,
        sampling: Sampling { temperature: 0.8, top_k: 50, top_p: 0.9, ..Sampling::default() },
        eos_token_id: None,
        seed: 7,
    };
    let prompts = input_ids.narrow(1, 0, 4); // (B, 4)
    let texts = model.generate(&prompts, &params)?;
    assert_eq!(texts.size(), [2, 12]); // (B, 4 + 8)
    assert_eq!(texts, model.generate(&prompts, &params)?); // the same seed draws the same tokens
    println!("continued: {texts}");
    Ok(())
}
