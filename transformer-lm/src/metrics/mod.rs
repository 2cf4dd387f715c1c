//! The record of a run. Only rank 0 writes.
//!
//! ```text
//! runs/20260131_093000_demo/        RunFolder
//!   config_used.yaml                the configuration, every key
//!   run_metadata.json               when, where, on what (one entry per start)
//!   metrics.csv                     one row per log line and per validation
//!   tensorboard/                    the same for TensorBoard
//!   best_model/, final_model/, …    see crate::checkpoint
//! ```

mod csv;
mod folder;
mod metadata;
mod progress;
mod recorder;
mod tensorboard;

pub use csv::{HEADER, MetricsCsv, Phase, Row};
pub use folder::RunFolder;
pub(crate) use metadata::host;
pub use metadata::{Device, RunMetadata};
pub use progress::Progress;
pub(crate) use progress::thousands;
pub use recorder::Recorder;
pub use tensorboard::EventFile;
