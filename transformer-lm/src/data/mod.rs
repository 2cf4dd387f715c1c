//! Tokenizers, token shards, their preparation from text, and loaders.
//!
//! A data folder holds `train.bin`, `val.bin` ([`shard`]), each perhaps in several shards (`train-00001-of-00003.bin`), and
//! `tokenizer.json`. Data sets are cut into blocks of
//! `seq_len + 1` tokens, each block's last token being the next one's first: a block holds `seq_len` predictions.

mod bpe;
mod dataset;
mod encode;
mod input;
mod loader;
mod ordered;
mod output;
mod prepare;
pub mod shard;
mod tokenizer;
mod verify;

pub use bpe::BytePairs;
pub(crate) use bpe::symbol;
pub(crate) use dataset::preparation;
pub use dataset::{PreparedData, TRAIN, TokenDataset, VAL, load_preprocessed_data};
pub use loader::{BatchStream, LoaderConfig, TrainLoader, ValBatches, ValLoader, get_dataloaders, loaders_of};
pub use prepare::{PrepareOptions, PrepareSummary, TokenizerKind, prepare};
pub(crate) use tokenizer::GPT2_VOCABULARY;
pub use tokenizer::{Alphabet, StreamDecoder, TOKENIZER_FILE, Tokenizer};
pub use verify::{Verified, verify};
