//! A GPT trainer on `hvd-torch`: data, model, training loop, checkpoints, generation.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | the typed configuration file: [`load_config`], overrides, validation |
//! | [`data`] | tokenizers, token shards, loaders |
//! | [`model`] | [`model::TransformerLM`] |
//! | [`trainer`] | [`run_distributed_training`]: the loop from the first step to the last checkpoint |
//! | [`checkpoint`] | folders that are either whole or not there |
//! | [`memory`] | the allocator in a training loop |
//! | [`metrics`] | the run folder: `metrics.csv`, TensorBoard files, the progress line |
//! | [`report`] | the curves of runs as a page and a picture |
//! | [`interchange`] | models to and from `transformers` |
//! | [`generate`] | text from a checkpoint, once or as a conversation |
//! | [`cli`] | the command lines of `train`, `generate` and `lm`; the binaries only call it |
#![deny(missing_docs)]

pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod generate;
pub mod interchange;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod report;
mod stdout;
pub mod trainer;

pub use checkpoint::{load_checkpoint, save_checkpoint};
pub use config::{Config, load_config};
pub use data::{get_dataloaders, load_preprocessed_data};
pub use error::{Error, Result};
pub use generate::{generate_text, interactive_generation, load_model_for_generation};
pub use model::{ModelConfig, TransformerLM};
pub use trainer::{run_distributed_training, setup_horovod};
