//! The typed configuration file.
//!
//! A configuration is made of layers: the defaults, a YAML file, then `section.key=value` overrides. Every layer is checked
//! for unknown keys and wrong types on its own, so that an error names the file or flag at fault; the result is checked
//! for impossible values.
//!
//! ```
//! # fn main() -> Result<(), transformer_lm::Error> {
//! use transformer_lm::config::Config;
//!
//! let config = Config::from_yaml("training: {epochs: 3}", "demo.yaml")?;
//! assert_eq!((config.training.epochs, config.model.d_model), (3, 768));
//! # Ok(()) }
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_yaml::Value;

use crate::model::{ModelConfig, Positions};
use crate::{Error, Result};

mod layers;
mod validate;
mod values;

pub use values::{AmpDtype, DeviceChoice, HorovodCompression, LrSchedule, VocabSize, WeightDecayOn};

/// Everything that a run depends on, apart from the text and the number of ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The shape of the transformer.
    pub model: ModelSection,
    /// The loop: how long, how fast, how often to log, evaluate and save.
    pub training: TrainingSection,
    /// Where the tokens are.
    pub data: DataSection,
    /// Defaults of text generation.
    pub generation: GenerationSection,
    /// Where runs are recorded.
    pub paths: PathsSection,
    /// How gradients travel.
    pub distributed: DistributedSection,
    /// Seed of the initial weights, the order of the data and dropout.
    pub seed: Seed,
}

/// The root key `seed`; 42 by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(pub u64);

impl Default for Seed {
    fn default() -> Self {
        Seed(42)
    }
}

/// Section `model`: the shape of the transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// Width of the residual stream; a multiple of `n_heads`.
    pub d_model: usize,
    /// Attention heads per layer.
    pub n_heads: usize,
    /// Number of layers.
    pub n_layers: usize,
    /// Width of the feed-forward part.
    pub d_ff: usize,
    /// Probability that dropout zeroes an activation; in [0, 1).
    pub dropout: f64,
    /// Context: the most tokens that the model sees at once.
    pub max_seq_len: usize,
    /// Whether positions are learned or sinusoidal.
    pub positions: Positions,
    /// Size of the vocabulary, or `auto`, which it is where it is left out: that of the prepared data.
    pub vocab_size: VocabSize,
    /// Token that only fills up, or null. With `vocab_size: auto` an id beyond the vocabulary counts as null.
    pub pad_token_id: Option<i64>,
}

impl Default for ModelSection {
    fn default() -> Self {
        ModelSection {
            d_model: 768,
            n_heads: 12,
            n_layers: 12,
            d_ff: 3072,
            dropout: 0.1,
            max_seq_len: 512,
            positions: Positions::Learned,
            vocab_size: VocabSize::Auto,
            pad_token_id: Some(50256),
        }
    }
}

/// Section `training`: the loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingSection {
    /// A checkpoint, or a run's folder, whose weights a new run starts with; null: weights drawn from the seed.
    pub init_from: Option<PathBuf>,
    /// Trains on the first global batch again and again, to see whether a model can learn at all.
    pub overfit_one_batch: bool,
    /// A file to write what each update's time goes to, for <https://ui.perfetto.dev>; null: none. It is made anew.
    pub profile: Option<PathBuf>,
    /// Passes over the training part; ignored where `max_steps` is given.
    pub epochs: u64,
    /// Optimizer updates in all, or null: `epochs` decides.
    pub max_steps: Option<u64>,
    /// Sequences per rank and micro-batch; with `global_batch_size` the upper bound of it.
    pub per_gpu_batch_size: usize,
    /// Sequences per optimizer update over all ranks; accumulation is then derived. Null: `per_gpu_batch_size` ×
    /// `gradient_accumulation_steps` × ranks.
    pub global_batch_size: Option<usize>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Where the schedule ends; at most `learning_rate`.
    pub min_lr: f64,
    /// What the learning rate does after warmup.
    pub lr_schedule: LrSchedule,
    /// With `lr_schedule: wsd`, the share of the updates, the last ones, in which the learning rate falls; in [0, 1].
    pub lr_decay_share: f64,
    /// Updates over which the learning rate rises linearly to its peak.
    pub warmup_steps: u64,
    /// AdamW's decoupled decay.
    pub weight_decay: f64,
    /// The parameters that decay.
    pub weight_decay_on: WeightDecayOn,
    /// AdamW's decay rates of the two moments.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// Micro-batches per update; ignored where `global_batch_size` is given.
    pub gradient_accumulation_steps: usize,
    /// The reduced gradients are scaled down to this norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Share of the target's probability that is spread over the whole vocabulary in training (not in validation); in [0, 1).
    pub label_smoothing: f64,
    /// Updates whose loss or gradient norm is so many standard deviations above the mean of the last 128 are skipped; 0: none.
    pub skip_outliers_z: f64,
    /// Updates with a loss or gradient that is not finite, and outliers, are skipped; so many in a row, and training ends
    /// with an error.
    pub max_skipped_in_a_row: u64,
    /// Ends training after so many validations in a row without a new lowest loss; null: never.
    pub early_stopping_patience: Option<u64>,
    /// Updates between two lines of the log.
    pub log_interval: u64,
    /// Updates between two checkpoints; 0: only at the ends of epochs and of training.
    pub save_interval: u64,
    /// Updates between two validations; 0: only at the ends of epochs and of training.
    pub eval_interval: u64,
    /// Updates between two records of the distributions of weights and gradients for TensorBoard; 0: never.
    pub histogram_interval: u64,
    /// Tokens of the sample of text at each validation; 0: none.
    pub sample_tokens: usize,
    /// What the sample continues.
    pub sample_prompt: String,
    /// How many of the newest `checkpoint_*` folders stay; 0 keeps all. `best_model` and `final_model` always stay.
    pub keep_checkpoints: usize,
    /// Multiplies `learning_rate` and `min_lr` by the number of ranks.
    pub scale_lr_by_world_size: bool,
    /// Precision of the arithmetic.
    pub amp_dtype: AmpDtype,
    /// Recomputes activations in the backward pass instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Floating-point operations per second that a rank's processor can do, in TFLOP/s, for MFU; null: measured at the start.
    pub peak_tflops: Option<f64>,
    /// Where to compute.
    pub device: DeviceChoice,
}

impl Default for TrainingSection {
    fn default() -> Self {
        TrainingSection {
            init_from: None,
            overfit_one_batch: false,
            profile: None,
            epochs: 10,
            max_steps: None,
            per_gpu_batch_size: 16,
            global_batch_size: None,
            learning_rate: 3e-4,
            min_lr: 0.0,
            lr_schedule: LrSchedule::Linear,
            lr_decay_share: 0.2,
            warmup_steps: 1000,
            weight_decay: 0.01,
            weight_decay_on: WeightDecayOn::Matrices,
            betas: [0.9, 0.999],
            eps: 1e-8,
            gradient_accumulation_steps: 2,
            max_grad_norm: 1.0,
            label_smoothing: 0.0,
            skip_outliers_z: 0.0,
            max_skipped_in_a_row: 10,
            early_stopping_patience: None,
            log_interval: 50,
            save_interval: 500,
            eval_interval: 250,
            histogram_interval: 500,
            sample_tokens: 64,
            sample_prompt: String::new(),
            keep_checkpoints: 3,
            scale_lr_by_world_size: false,
            amp_dtype: AmpDtype::Bf16,
            gradient_checkpointing: false,
            peak_tflops: None,
            device: DeviceChoice::Auto,
        }
    }
}

/// Section `data`: where the tokens are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// The folder that `lm prepare` wrote.
    pub data_dir: PathBuf,
    /// Threads that read ahead.
    pub num_workers: usize,
}

impl Default for DataSection {
    fn default() -> Self {
        DataSection { data_dir: "data/prepared".into(), num_workers: 8 }
    }
}

/// Section `generation`: defaults of text generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationSection {
    /// Length of a reply in tokens.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Draws from this many likeliest tokens; 0 from all.
    pub top_k: usize,
    /// Draws from the fewest tokens that hold this probability; in (0, 1].
    pub top_p: f64,
    /// Leaves out tokens with less than this share of the likeliest one's probability; in [0, 1], 0 leaves out none.
    pub min_p: f64,
    /// Above 1 makes tokens that are in the text already less likely; 1 changes nothing.
    pub repetition_penalty: f64,
    /// A reply ends before the first of these texts.
    pub stop: Vec<String>,
    /// Texts per prompt.
    pub num_samples: usize,
}

impl Default for GenerationSection {
    fn default() -> Self {
        GenerationSection {
            max_new_tokens: 100,
            temperature: 0.8,
            top_k: 50,
            top_p: 0.9,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: Vec::new(),
            num_samples: 5,
        }
    }
}

/// Section `paths`: where runs are recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PathsSection {
    /// Holds the folders of runs, `<timestamp>_<run name>`, each with its checkpoints. `--output_dir` overrides it.
    pub checkpoint_dir: PathBuf,
    /// Where `metrics.csv` goes, in a subfolder with the run folder's name; null: into the run's folder.
    pub log_dir: Option<PathBuf>,
    /// The same for TensorBoard's event files; null: `tensorboard` in the run's folder.
    pub tensorboard_dir: Option<PathBuf>,
}

impl Default for PathsSection {
    fn default() -> Self {
        PathsSection { checkpoint_dir: "runs".into(), log_dir: None, tensorboard_dir: None }
    }
}

/// Section `distributed`: how gradients travel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistributedSection {
    /// Compression of gradients on the wire.
    pub horovod_compression: HorovodCompression,
    /// Whether each rank keeps only its share of AdamW's moments; null: in models of 32 million parameters and more.
    pub shard_optimizer: Option<bool>,
}

/// Reads and checks a configuration file.
///
/// # Errors
/// [`Error::Config`] that names the file, the key, its value and what was expected.
pub fn load_config(path: impl AsRef<Path>) -> Result<Config> {
    Config::load(Some(path.as_ref()), &[])
}

impl Config {
    /// The defaults, then the file (if any), then `section.key=value` overrides in order.
    ///
    /// # Errors
    /// As [`load_config`].
    pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<Config> {
        let mut layers = Vec::new();
        if let Some(path) = path {
            let text = std::fs::read_to_string(path).map_err(|error| {
                let hint = "hint: --config takes a YAML file such as configs/demo.yaml";
                Error::Config(format!("cannot read the configuration {}: {error}\n{hint}", path.display()))
            })?;
            layers.push(layers::Layer::parse(&text, &path.display().to_string())?);
        }
        for text in overrides {
            layers.push(layers::Layer::parse_override(text)?);
        }
        layers::build(Config::default(), &layers)
    }

    /// Reads a configuration from text; `source` is the name that errors give it.
    ///
    /// # Errors
    /// As [`load_config`].
    pub fn from_yaml(text: &str, source: &str) -> Result<Config> {
        layers::build(Config::default(), &[layers::Layer::parse(text, source)?])
    }

    /// Lays `value`, a mapping of sections, over this configuration: what it does not name stays.
    ///
    /// # Errors
    /// As [`load_config`].
    pub fn merge(&self, value: Value) -> Result<Config> {
        layers::build(self.clone(), &[layers::Layer::new(value, "merged values")?])
    }

    /// The configuration as a tree of YAML values.
    pub fn to_dict(&self) -> Value {
        serde_yaml::to_value(self).unwrap_or_default()
    }

    /// The configuration as YAML text with every key.
    pub fn to_yaml(&self) -> String {
        serde_yaml::to_string(self).unwrap_or_default()
    }

    /// Writes [`Config::to_yaml`] to a file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        std::fs::write(&path, self.to_yaml()).map_err(Error::io("write", path))
    }

    /// The model's shape, with `auto` replaced by the vocabulary of the data.
    pub fn model_config(&self, data_vocab_size: usize) -> ModelConfig {
        let model = &self.model;
        let vocab_size = match model.vocab_size {
            VocabSize::Auto => data_vocab_size,
            VocabSize::Fixed(size) => size,
        };
        ModelConfig {
            vocab_size,
            d_model: model.d_model,
            n_heads: model.n_heads,
            n_layers: model.n_layers,
            d_ff: model.d_ff,
            max_seq_len: model.max_seq_len,
            positions: model.positions,
            dropout: model.dropout,
            pad_token_id: model.pad_token_id,
            label_smoothing: self.training.label_smoothing,
            gradient_checkpointing: self.training.gradient_checkpointing,
        }
    }

    /// This configuration with the vocabulary's size filled in; what a checkpoint keeps.
    ///
    /// # Errors
    /// [`Error::Config`] where `vocab_size` is a number that the data's tokens exceed.
    pub fn resolved(&self, data_vocab_size: usize) -> Result<Config> {
        let mut config = self.clone();
        match config.model.vocab_size {
            VocabSize::Fixed(size) if size < data_vocab_size => {
                return Err(Error::Config(format!(
                    "model.vocab_size = {size}, but the data in {} has tokens up to {}\n\
                     hint: use vocab_size: auto, or at least {data_vocab_size}",
                    self.data.data_dir.display(),
                    data_vocab_size - 1
                )));
            }
            VocabSize::Fixed(_) => {}
            VocabSize::Auto => {
                config.model.vocab_size = VocabSize::Fixed(data_vocab_size);
                let fits = |id: &i64| (*id as u64) < data_vocab_size as u64;
                config.model.pad_token_id = config.model.pad_token_id.filter(fits);
            }
        }
        Ok(config)
    }

    /// Things that are allowed but seldom meant, one text each.
    pub fn warnings(&self) -> Vec<String> {
        validate::warnings(self)
    }
}

#[cfg(test)]
mod tests;
