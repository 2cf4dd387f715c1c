//! Tokenizers, token shards, their preparation from text, and loaders.
//!
//! A data folder holds `train.bin`, `val.bin` ([`shard`]) and `tokenizer.json`. Data sets are cut into blocks of
//! `seq_len + 1` tokens, each block's last token being the next one's first: a block holds `seq_len` predictions.

mod dataset;
mod loader;
mod output;
mod prepare;
pub mod shard;
mod tokenizer;

pub use dataset::{PreparedData, TRAIN_FILE, TokenDataset, VAL_FILE, load_preprocessed_data};
pub use loader::{LoaderConfig, TrainLoader, ValBatches, ValLoader, get_dataloaders, loaders_of};
pub use prepare::{PrepareOptions, PrepareSummary, TokenizerKind, prepare};
pub use tokenizer::{Alphabet, StreamDecoder, TOKENIZER_FILE, Tokenizer};
