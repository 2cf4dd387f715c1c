//! The record of a run. Only rank 0 writes.
//!
//! ```text
//! runs/20260131_093000_demo/        RunFolder
//!   config_used.yaml                the configuration, every key
//!   run.lock                        locked while a training writes into the folder
//!   run_metadata.json               when, where, on what (one entry per start)
//!   metrics.csv                     one row per log line and per validation
//!   metrics.jsonl                   the same with more figures, and samples of text
//!   tensorboard/                    the same for TensorBoard
//!   best_model/, final_model/, …    see crate::checkpoint
//! ```

mod csv;
mod folder;
mod jsonl;
mod lines;
mod lock;
mod metadata;
mod progress;
mod recorder;
mod row;
mod tensorboard;

pub use csv::{HEADER, MetricsCsv};
pub use folder::RunFolder;
pub use jsonl::MetricsJsonl;
pub use lock::RunLock;
pub(crate) use metadata::host;
pub use metadata::{Device, RunMetadata};
pub use progress::Progress;
pub(crate) use progress::{count, thousands};
pub use recorder::Recorder;
pub use row::{Figures, Phase, Row};
pub use tensorboard::{EventFile, Histogram};
