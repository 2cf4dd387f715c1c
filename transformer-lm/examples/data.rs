//! Turns text into tokens, opens the folder, and walks over its batches.

use tch::Device;
use transformer_lm::data::{LoaderConfig, PrepareOptions, TokenizerKind, prepare};
use transformer_lm::{Result, get_dataloaders, load_preprocessed_data};

fn main() -> Result<()> {
    // The same as `lm prepare --input text.txt --tokenizer char --output data/chars --overwrite`.
    let summary = prepare(&PrepareOptions {
        input: vec!["text.txt".into()],
        tokenizer: TokenizerKind::Char,
        output: "data/chars".into(),
        val_fraction: 0.1,
        overwrite: true,
        ..PrepareOptions::default()
    })?;
    println!("{} characters, {} different ones", summary.train_tokens + summary.val_tokens, summary.vocab_size);

    // Two data sets and the tokenizer. The files are mapped into memory, not read.
    let data = load_preprocessed_data("data/chars")?;
    assert_eq!((data.train.tokens(), data.vocab_size), (summary.train_tokens, summary.vocab_size));
    let block = data.train.block(16, 0)?; // 16 predictions take 17 tokens
    let tokens: Vec<u32> = block.iter().map(|token| *token as u32).collect();
    println!("the first block: {:?}", data.tokenizer.decode(&tokens));

    // Batches for rank 1 of 2: of each update's 8 sequences it takes 4, in 2 micro-batches of 2.
    let config = LoaderConfig {
        data_dir: "data/chars".into(),
        seq_len: 16,
        global_batch: 8,
        micro_batch: 2,
        rank: 1,
        size: 2,
        seed: 42,
        device: Device::Cpu,
    };
    let (train, val) = get_dataloaders(&config)?;
    for micro_batches in train.stream(0, 0, 2).take(3) {
        // From epoch 0, update 0, read ahead by 2 threads; a stream goes on epoch after epoch.
        let micro_batches = micro_batches?;
        assert_eq!(micro_batches.len(), 2);
        assert_eq!(micro_batches[0].size(), [2, 17]); // (B, seq_len + 1)
    }
    let held_out: i64 = val.batches().map(|batch| batch.map(|batch| batch.size()[0])).sum::<Result<_>>()?;
    println!("{} updates an epoch; {held_out} held-out blocks are this rank's", train.steps_per_epoch());
    Ok(())
}
