//! Configurations that are wrong, each with the message expected; and the arithmetic of merging.

use super::*;

/// `(text, what the message contains)`; the file is called `c.yaml`.
const WRONG: &[(&str, &[&str])] = &[
    ("model: [", &["c.yaml", "not valid YAML"]),
    ("just words", &["c.yaml", "expected sections", "\"just words\""]),
    ("modell: {d_model: 4}", &["unknown key `modell`", "did you mean `model`?"]),
    ("model: 5", &["model is a section", "found 5"]),
    ("model: {d_modle: 768}", &["c.yaml", "unknown key `model.d_modle`", "did you mean `model.d_model`?"]),
    ("training: {learning_rte: 1}", &["did you mean `training.learning_rate`?"]),
    ("training: {d_model: 4}", &["unknown key `training.d_model`", "did you mean `model.d_model`?"]),
    ("epochs: 4", &["unknown key `epochs`", "did you mean `training.epochs`?"]),
    ("data: {zzzzzzzz: 1}", &["unknown key `data.zzzzzzzz`", "known keys: data_dir, num_workers"]),
    ("model: {7: 1}", &["unknown key `model.7`"]),
    ("model: {d_model: wide}", &["model.d_model = \"wide\"", "expected a whole number of at least 1"]),
    ("model: {d_model: -4}", &["model.d_model = -4", "expected a whole number"]),
    ("model: {d_model: 0}", &["model.d_model = 0", "at least 1"]),
    ("model: {d_model: 768.5}", &["model.d_model = 768.5"]),
    ("model: {n_heads: 0}", &["model.n_heads = 0"]),
    ("model: {n_heads: 5}", &["model.n_heads = 5 does not divide model.d_model = 768"]),
    ("model: {n_layers: 0}", &["model.n_layers = 0"]),
    ("model: {d_ff: 0}", &["model.d_ff = 0"]),
    ("model: {dropout: 1.0}", &["model.dropout = 1.0", "less than 1"]),
    ("model: {dropout: .nan}", &["model.dropout", "less than 1"]),
    ("model: {dropout: -0.1}", &["model.dropout = -0.1"]),
    ("model: {positions: rotary}", &["model.positions = \"rotary\"", "one of learned, sinusoidal"]),
    ("model: {max_seq_len: 1}", &["model.max_seq_len = 1", "at least 2"]),
    ("model: {vocab_size: 1}", &["model.vocab_size = 1"]),
    ("model: {vocab_size: automatic}", &["model.vocab_size = \"automatic\"", "or auto"]),
    ("model: {vocab_size: 256}", &["model.pad_token_id = 50256", "less than model.vocab_size"]),
    ("training: {epochs: 0}", &["training.epochs = 0"]),
    ("training: {max_steps: 0}", &["training.max_steps = 0", "or null"]),
    ("training: {per_gpu_batch_size: 0}", &["training.per_gpu_batch_size = 0"]),
    ("training: {global_batch_size: 0}", &["training.global_batch_size = 0"]),
    ("training: {learning_rate: 0}", &["training.learning_rate = 0", "greater than 0"]),
    ("training: {learning_rate: .inf}", &["training.learning_rate", "greater than 0"]),
    ("training: {min_lr: 1}", &["training.min_lr = 1", "above training.learning_rate = 0.0003 (c.yaml (by default))"]),
    ("training: {lr_schedule: step}", &["training.lr_schedule = \"step\"", "linear, cosine, constant"]),
    ("training: {lr_decay_share: 1.5}", &["training.lr_decay_share = 1.5", "at most 1"]),
    ("training: {weight_decay_on: biases}", &["training.weight_decay_on = \"biases\"", "matrices, all"]),
    ("training: {label_smoothing: 1}", &["training.label_smoothing = 1", "less than 1"]),
    ("training: {skip_outliers_z: -1}", &["training.skip_outliers_z = -1", "0 turns it off"]),
    ("training: {early_stopping_patience: 0}", &["training.early_stopping_patience = 0", "or null"]),
    ("training: {warmup_steps: -1}", &["training.warmup_steps = -1"]),
    ("training: {betas: [0.9]}", &["training.betas = [0.9]", "two numbers"]),
    ("training: {betas: [0.9, 1.0]}", &["training.betas = [0.9,1.0]", "less than 1"]),
    ("training: {eps: 0}", &["training.eps = 0"]),
    ("training: {max_grad_norm: -1}", &["training.max_grad_norm = -1"]),
    ("training: {log_interval: 0}", &["training.log_interval = 0"]),
    ("training: {amp_dtype: float32}", &["training.amp_dtype = \"float32\"", "one of bf16, fp16, fp32, fp64"]),
    ("training: {amp_dtype: fp16, device: cpu}", &["training.amp_dtype", "needs CUDA"]),
    ("training: {device: tpu}", &["training.device = \"tpu\"", "cuda:N"]),
    ("training: {scale_lr_by_world_size: 3}", &["training.scale_lr_by_world_size = 3", "true or false"]),
    ("training: {gradient_accumulation_steps: 0}", &["training.gradient_accumulation_steps = 0"]),
    ("generation: {top_p: 0}", &["generation.top_p = 0"]),
    ("generation: {temperature: -1}", &["generation.temperature = -1"]),
    ("distributed: {horovod_compression: zip}", &["distributed.horovod_compression = \"zip\"", "none, fp16, bf16"]),
    ("seed: -1", &["seed = -1"]),
    ("seed: {a: 1}", &["seed = {\"a\":1}"]),
    ("model: {d_model: 4, d_model: 8}", &["c.yaml", "duplicate"]),
];

#[test]
fn wrong_configurations_are_refused_with_the_reason() {
    for (text, expected) in WRONG {
        let message = match Config::from_yaml(text, "c.yaml") {
            Ok(_) => panic!("accepted: {text}"),
            Err(error) => error.to_string(),
        };
        for part in *expected {
            assert!(message.contains(part), "`{text}` gave `{message}`, without `{part}`");
        }
        assert!(message.starts_with("c.yaml"), "{message}");
    }
}

#[test]
fn a_missing_file_is_a_mistake_of_the_configuration() {
    let error = load_config("no/such.yaml").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("no/such.yaml"), "{error}");
}

#[test]
fn the_configurations_in_the_repository_are_right() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    assert_eq!(load_config(folder.join("config.yaml")).unwrap().training, TrainingSection::default());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = load_config(&path).unwrap();
        assert!(config.warnings().is_empty(), "{}", path.display());
        names.push((path.file_stem().unwrap().to_str().unwrap().to_owned(), config));
    }
    let config = |name: &str| &names.iter().find(|(other, _)| other == name).unwrap().1;
    assert_eq!(config("demo").training.global_batch_size, Some(24));
    let millions = |name: &str| config(name).model_config(65).parameter_count() / 1_000_000;
    let sizes = ["shakespeare-char-cpu", "shakespeare-char", "gpt2-124m", "gpt2-medium", "finetune"].map(millions);
    assert_eq!(sizes, [0, 10, 124, 354, 124]);
    assert!(
        ["gpt2-124m", "gpt2-medium"]
            .iter()
            .all(|name| config(name).training.min_lr < config(name).training.learning_rate)
    );
}

#[test]
fn overrides_win_and_are_named() {
    let text = |parts: &[&str]| parts.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let config =
        Config::load(None, &text(&["training.learning_rate=3e-3", "seed=7", "model.vocab_size=auto"])).unwrap();
    assert_eq!((config.training.learning_rate, config.seed.0, config.model.vocab_size), (3e-3, 7, VocabSize::Auto));
    for (wrong, expected) in [
        ("training.epochs", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("training.epoch=3", "did you mean `training.epochs`?"),
        ("training.epochs=many", "--set training.epochs=many: training.epochs = \"many\""),
        ("model.n_heads=7", "--set model.n_heads=7: model.n_heads = 7 does not divide"),
        ("training=3", "training is a section"),
    ] {
        let message = Config::load(None, &text(&[wrong])).unwrap_err().to_string();
        assert!(message.contains(expected), "`{wrong}` gave `{message}`");
    }
}

#[test]
fn a_saved_configuration_reads_back_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.yaml");
    let text = "training: {max_steps: 5, device: 'cuda:1', betas: [0.8, 0.9]}\nmodel:\ngeneration: {top_k: 0}";
    let config = Config::from_yaml(text, "c.yaml").unwrap();
    config.save(&path).unwrap();
    assert_eq!(load_config(&path).unwrap(), config);
    assert_eq!(config.training.device, DeviceChoice::Cuda(Some(1)));
}

#[test]
fn merge_keeps_what_is_not_named() {
    let base = Config::from_yaml("training: {epochs: 3, min_lr: 1e-5}", "c.yaml").unwrap();
    let merged = base.merge(serde_yaml::from_str("training: {epochs: 4}").unwrap()).unwrap();
    assert_eq!((merged.training.epochs, merged.training.min_lr), (4, 1e-5));
    assert!(base.merge(serde_yaml::from_str("training: {epoch: 4}").unwrap()).is_err());
}

#[test]
fn every_key_has_its_expectation() {
    let tree = Config::default().to_dict();
    let mut keys = Vec::new();
    for (name, section) in tree.as_mapping().unwrap() {
        let name = name.as_str().unwrap();
        match section.as_mapping() {
            Some(section) => keys.extend(section.keys().map(|key| format!("{name}.{}", key.as_str().unwrap()))),
            None => keys.push(name.to_string()),
        }
    }
    let described: Vec<&str> = validate::EXPECTED.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, described);
}
