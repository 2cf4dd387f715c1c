//! Lets a trained model continue texts: several at once, piece by piece, and in a conversation.

use std::io::Write;

use tch::Device;
use transformer_lm::generate::{TextParams, stream_text};
use transformer_lm::model::sampling::Sampling;
use transformer_lm::{generate_text, interactive_generation, load_model_for_generation};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A checkpoint, a run's folder (its best checkpoint) or a folder of runs (the newest one's). `None`: the checkpoint's own
    // configuration.
    let (model, tokenizer, config) = load_model_for_generation("runs", None, Device::Cpu)?;
    println!("context {}, tokenizer {}", config.model.max_seq_len, tokenizer.name());

    let params = TextParams {
        max_new_tokens: 20,
        sampling: Sampling { temperature: 0.8, top_k: 50, top_p: 0.9, ..Sampling::default() },
        stop: vec!["\n\n".into()],
        seed: 7,
    };
    let texts = generate_text(&model, &tokenizer, "the king", &params, 3)?; // three samples, side by side
    assert!(texts.len() == 3 && texts.iter().all(|text| text.starts_with("the king")));
    println!("{texts:#?}");

    print!("the king"); // the same first sample, as it is drawn
    let mut written = String::from("the king");
    for piece in stream_text(&model, &tokenizer, "the king", &params)? {
        let piece = piece?;
        print!("{piece}");
        std::io::stdout().flush()?;
        written.push_str(&piece);
    }
    println!();
    assert_eq!(written, texts[0]);

    // Reads prompts until the input ends, or a line says `quit`; `/help` tells what else it understands.
    interactive_generation(&model, &tokenizer, &params)?;
    Ok(())
}
