//! `lm evaluate`.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use serde_json::json;
use tch::Device;

use crate::checkpoint::resolve;
use crate::config::DeviceChoice;
use crate::data::{LoaderConfig, PreparedData, ValLoader, load_preprocessed_data};
use crate::generate::load_model_for_generation;
use crate::model::TransformerLM;
use crate::stdout::say;
use crate::trainer::{BatchPlan, Evaluator, Precision, Setup, Sums, device_of, most_at_once, setup_horovod};
use crate::{Config, Error, Result};

/// Which part of a data folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The held-out part.
    Val,
    /// The part to train on.
    Train,
}

/// Measure a checkpoint over all of a data folder's held-out part, on one process or several
#[derive(Parser, Debug)]
pub struct EvaluateArgs {
    /// A checkpoint, or a run's folder: then its best checkpoint, else its newest
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// A folder that `lm prepare` made with the checkpoint's tokenizer [default: the one that it was trained on]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// The part to measure
    #[arg(long, value_enum, default_value = "val")]
    part: Part,

    /// Print an object: loss (nats per token), perplexity, accuracy, bits_per_byte, tokens, bytes, checkpoint
    #[arg(long)]
    json: bool,

    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

/// Runs `lm evaluate`; every rank that the launcher started takes a share.
///
/// # Errors
/// No such checkpoint or data, or data of another tokenizer; what the other ranks report.
pub fn run(args: EvaluateArgs) -> Result<()> {
    let setup = setup_horovod(false)?;
    match evaluate(&args, &setup) {
        Ok(figures) => {
            hvd_torch::shutdown().map_err(hvd_torch::Error::from)?;
            if setup.rank == 0 { say(&format!("{figures}\n")) } else { Ok(()) }
        }
        Err(error) => {
            if !error.is_lost_peer() {
                setup.world.abort(&error.to_string());
            }
            Err(error)
        }
    }
}

/// The figures of all ranks, as text.
fn evaluate(args: &EvaluateArgs, setup: &Setup) -> Result<String> {
    let device = device_of(args.device, setup)?;
    let checkpoint = resolve(&args.checkpoint)?;
    let (model, tokenizer, config) = load_model_for_generation(&checkpoint, None, device)?;
    let folder = args.data.as_ref().unwrap_or(&config.data.data_dir);
    let data = load_preprocessed_data(folder).map_err(|error| match error {
        Error::Data { path, detail } if args.data.is_none() && !folder.is_dir() => Error::data(
            path,
            format!("{detail}\nhint: the checkpoint's configuration names this folder; --data takes another"),
        ),
        error => error,
    })?;
    if data.tokenizer != tokenizer {
        return Err(Error::data(
            folder,
            "made with another tokenizer than the checkpoint's; prepare the text with that one",
        ));
    }
    let precision = Precision::new(config.training.amp_dtype, device)?;
    let loader = loader_of(args.part, &data, &config, &model, setup, device)?;
    let sums = Evaluator::new(loader, &tokenizer, precision).evaluate(&model, &setup.world)?;
    Ok(if args.json { as_json(&sums, &checkpoint) } else { as_text(&sums, &checkpoint) })
}

/// In batches of the size that training had, so that sums are rounded alike.
fn loader_of(
    part: Part,
    data: &PreparedData,
    config: &Config,
    model: &TransformerLM,
    setup: &Setup,
    device: Device,
) -> Result<ValLoader> {
    let most = most_at_once(device, model.config());
    let micro_batch = BatchPlan::new(&config.training, setup.world_size, most).map_or(1, |plan| plan.micro);
    let dataset = match part {
        Part::Val => data.val.clone(),
        Part::Train => data.train.clone(),
    };
    let loader = LoaderConfig {
        data_dir: config.data.data_dir.clone(),
        seq_len: model.config().max_seq_len,
        global_batch: micro_batch * setup.world_size,
        micro_batch,
        rank: setup.rank,
        size: setup.world_size,
        seed: config.seed.0,
        device,
    };
    ValLoader::new(dataset, &loader)
}

fn as_json(sums: &Sums, checkpoint: &std::path::Path) -> String {
    json!({
        "loss": sums.mean_loss(), "perplexity": sums.perplexity(), "accuracy": sums.accuracy(),
        "bits_per_byte": sums.bits_per_byte(), "tokens": sums.tokens as u64, "bytes": sums.bytes as u64, "checkpoint": checkpoint
    })
    .to_string()
}

fn as_text(sums: &Sums, checkpoint: &std::path::Path) -> String {
    format!(
        "{}\nloss {:.6} nats per token | perplexity {:.3} | accuracy {:.3} % | {:.6} bits per byte | {} tokens, {} bytes",
        checkpoint.display(),
        sums.mean_loss(),
        sums.perplexity(),
        100.0 * sums.accuracy(),
        sums.bits_per_byte(),
        sums.tokens,
        sums.bytes
    )
}
