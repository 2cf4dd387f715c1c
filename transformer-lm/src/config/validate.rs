//! What each key expects, and the checks of values.

use super::{AmpDtype, Config, DeviceChoice, VocabSize, layers};
use crate::{Error, Result};

const COUNT: &str = "a whole number of at least 1";
const COUNT_OR_ZERO: &str = "a whole number of at least 0";
const COUNT_OR_NULL: &str = "a whole number of at least 1, or null";
const POSITIVE: &str = "a number greater than 0";
const NOT_NEGATIVE: &str = "a number of at least 0";
const SHARE: &str = "a number of at least 0 and less than 1";
/// Each is a thread.
const MOST_WORKERS: usize = 1024;
const SWITCH: &str = "true or false";
const PATH: &str = "a path";
const PATH_OR_NULL: &str = "a path, or null";

/// Every key with what its value has to be.
pub(super) const EXPECTED: &[(&str, &str)] = &[
    ("model.d_model", COUNT),
    ("model.n_heads", COUNT),
    ("model.n_layers", COUNT),
    ("model.d_ff", COUNT),
    ("model.dropout", SHARE),
    ("model.max_seq_len", "a whole number of at least 2"),
    ("model.positions", "one of learned, sinusoidal"),
    ("model.vocab_size", "a whole number of at least 2, or auto"),
    ("model.pad_token_id", "a token id (a whole number of at least 0 and less than model.vocab_size), or null"),
    ("training.init_from", PATH_OR_NULL),
    ("training.overfit_one_batch", SWITCH),
    ("training.profile", PATH_OR_NULL),
    ("training.epochs", COUNT),
    ("training.max_steps", COUNT_OR_NULL),
    ("training.per_gpu_batch_size", COUNT),
    ("training.global_batch_size", COUNT_OR_NULL),
    ("training.learning_rate", POSITIVE),
    ("training.min_lr", "a number of at least 0 and at most training.learning_rate"),
    ("training.lr_schedule", "one of linear, cosine, constant, wsd"),
    ("training.lr_decay_share", "a number of at least 0 and at most 1"),
    ("training.warmup_steps", COUNT_OR_ZERO),
    ("training.weight_decay", NOT_NEGATIVE),
    ("training.weight_decay_on", "one of matrices, all"),
    ("training.betas", "two numbers of at least 0 and less than 1, for example [0.9, 0.95]"),
    ("training.eps", POSITIVE),
    ("training.gradient_accumulation_steps", COUNT),
    ("training.max_grad_norm", "a number of at least 0 (0 turns clipping off)"),
    ("training.label_smoothing", SHARE),
    ("training.skip_outliers_z", "a number of at least 0 (0 turns it off)"),
    ("training.max_skipped_in_a_row", COUNT_OR_ZERO),
    ("training.early_stopping_patience", COUNT_OR_NULL),
    ("training.log_interval", COUNT),
    ("training.save_interval", COUNT_OR_ZERO),
    ("training.eval_interval", COUNT_OR_ZERO),
    ("training.histogram_interval", COUNT_OR_ZERO),
    ("training.sample_tokens", COUNT_OR_ZERO),
    ("training.sample_prompt", "a text"),
    ("training.keep_checkpoints", "a whole number of at least 0 (0 keeps all)"),
    ("training.scale_lr_by_world_size", SWITCH),
    ("training.amp_dtype", "one of bf16, fp16, fp32, fp64"),
    ("training.gradient_checkpointing", SWITCH),
    ("training.peak_tflops", "a number greater than 0, or null"),
    ("training.device", "one of auto, cpu, cuda, cuda:N"),
    ("data.data_dir", PATH),
    ("data.num_workers", "a whole number of at least 0 and at most 1024"),
    ("generation.max_new_tokens", COUNT),
    ("generation.temperature", NOT_NEGATIVE),
    ("generation.top_k", "a whole number of at least 0 (0 turns it off)"),
    ("generation.top_p", "a number greater than 0 and at most 1"),
    ("generation.min_p", "a number of at least 0 and at most 1"),
    ("generation.repetition_penalty", POSITIVE),
    ("generation.stop", "a list of texts that are not empty"),
    ("generation.num_samples", COUNT),
    ("paths.checkpoint_dir", PATH),
    ("paths.log_dir", PATH_OR_NULL),
    ("paths.tensorboard_dir", PATH_OR_NULL),
    ("distributed.horovod_compression", "one of none, fp16, bf16"),
    ("distributed.shard_optimizer", "true, false or null"),
    ("seed", COUNT_OR_ZERO),
];

/// The text of an error about one value.
pub(super) fn wrong_value(source: &str, path: &str, found: &str) -> String {
    let expected = EXPECTED.iter().find(|(key, _)| *key == path).map_or("another value", |(_, expected)| expected);
    format!("{source}: {path} = {found}: expected {expected}")
}

/// Refuses impossible values; `source_of` names the file or flag that set a key.
pub(super) fn check(config: &Config, source_of: impl Fn(&str) -> String) -> Result<()> {
    if let Some(path) = out_of_range(config) {
        let tree = config.to_dict();
        let value = path.split('.').try_fold(&tree, |value, key| value.get(key)).map(layers::show);
        return Err(Error::Config(wrong_value(&source_of(path), path, &value.unwrap_or_default())));
    }
    match contradiction(config, &source_of) {
        Some((path, text)) => Err(Error::Config(format!("{}: {text}", source_of(path)))),
        None => Ok(()),
    }
}

/// The first key whose value is out of its range.
fn out_of_range(config: &Config) -> Option<&'static str> {
    let (model, training, generation, paths) = (&config.model, &config.training, &config.generation, &config.paths);
    let vocab = match model.vocab_size {
        VocabSize::Auto => i32::MAX as usize, // the largest that a model may have
        VocabSize::Fixed(size) => size,
    };
    let positive = |x: f64| x.is_finite() && x > 0.0;
    let not_negative = |x: f64| x.is_finite() && x >= 0.0;
    let share = |x: f64| (0.0..1.0).contains(&x);
    let checks = [
        ("model.d_model", model.d_model >= 1),
        ("model.n_heads", model.n_heads >= 1),
        ("model.n_layers", model.n_layers >= 1),
        ("model.d_ff", model.d_ff >= 1),
        ("model.dropout", share(model.dropout)),
        ("model.max_seq_len", model.max_seq_len >= 2),
        ("model.vocab_size", vocab >= 2),
        ("model.pad_token_id", model.pad_token_id.is_none_or(|id| id >= 0 && (id as u64) < vocab as u64)),
        ("training.epochs", training.epochs >= 1),
        ("training.max_steps", training.max_steps != Some(0)),
        ("training.per_gpu_batch_size", training.per_gpu_batch_size >= 1),
        ("training.global_batch_size", training.global_batch_size != Some(0)),
        ("training.learning_rate", positive(training.learning_rate)),
        ("training.min_lr", not_negative(training.min_lr)),
        ("training.lr_decay_share", (0.0..=1.0).contains(&training.lr_decay_share)),
        ("training.weight_decay", not_negative(training.weight_decay)),
        ("training.betas", training.betas.into_iter().all(share)),
        ("training.eps", positive(training.eps)),
        ("training.gradient_accumulation_steps", training.gradient_accumulation_steps >= 1),
        ("training.max_grad_norm", not_negative(training.max_grad_norm)),
        ("training.label_smoothing", share(training.label_smoothing)),
        ("training.skip_outliers_z", not_negative(training.skip_outliers_z)),
        ("training.early_stopping_patience", training.early_stopping_patience != Some(0)),
        ("training.log_interval", training.log_interval >= 1),
        ("training.peak_tflops", training.peak_tflops.is_none_or(positive)),
        ("generation.max_new_tokens", generation.max_new_tokens >= 1),
        ("generation.temperature", not_negative(generation.temperature)),
        ("generation.top_p", generation.top_p > 0.0 && generation.top_p <= 1.0),
        ("generation.min_p", (0.0..=1.0).contains(&generation.min_p)),
        ("generation.repetition_penalty", positive(generation.repetition_penalty)),
        ("generation.stop", !generation.stop.iter().any(String::is_empty)),
        ("generation.num_samples", generation.num_samples >= 1),
        ("data.num_workers", config.data.num_workers <= MOST_WORKERS),
        ("data.data_dir", !config.data.data_dir.as_os_str().is_empty()),
        ("paths.checkpoint_dir", !paths.checkpoint_dir.as_os_str().is_empty()),
    ];
    checks.into_iter().find(|(_, fine)| !fine).map(|(path, _)| path)
}

/// Values that are fine alone but not together: the key to blame and the text.
fn contradiction(config: &Config, source_of: impl Fn(&str) -> String) -> Option<(&'static str, String)> {
    let (model, training) = (&config.model, &config.training);
    if !model.d_model.is_multiple_of(model.n_heads) {
        let (width, heads) = (model.d_model, model.n_heads);
        return Some((
            "model.n_heads",
            format!("model.n_heads = {heads} does not divide model.d_model = {width}: expected a divisor of {width}"),
        ));
    }
    if training.min_lr > training.learning_rate {
        let (least, peak, source) = (training.min_lr, training.learning_rate, source_of("training.learning_rate"));
        return Some((
            "training.min_lr",
            format!(
                "training.min_lr = {least:?} is above training.learning_rate = {peak:?} ({source}): expected at most that"
            ),
        ));
    }
    if training.amp_dtype == AmpDtype::Fp16 && training.device == DeviceChoice::Cpu {
        return Some((
            "training.amp_dtype",
            "training.amp_dtype = \"fp16\" needs CUDA: expected bf16 or fp32 with device: cpu".into(),
        ));
    }
    None
}

/// Things that are allowed but seldom meant.
pub(super) fn warnings(config: &Config) -> Vec<String> {
    let training = &config.training;
    let mut warnings = Vec::new();
    if let Some(steps) = training.max_steps.filter(|steps| training.warmup_steps > *steps) {
        let warmup = training.warmup_steps;
        warnings
            .push(format!("training.warmup_steps = {warmup} exceeds max_steps = {steps}: the peak is never reached"));
    }
    if training.overfit_one_batch && training.early_stopping_patience.is_some() {
        warnings.push("training.early_stopping_patience is ignored with training.overfit_one_batch".into());
    }
    warnings
}
