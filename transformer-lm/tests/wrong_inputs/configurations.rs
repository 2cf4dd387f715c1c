//! Settings that make no sense, in the file and on the command line.

use std::fs;

use super::lab::Lab;

/// `--set` of one key, and what is said of it.
const SETTINGS: &[(&str, &str)] = &[
    ("model.d_model=0", "model.d_model = 0: expected a whole number of at least 1"),
    ("model.n_heads=3", "model.n_heads = 3 does not divide model.d_model = 16: expected a divisor of 16"),
    ("model.n_layers=-1", "model.n_layers = -1: expected a whole number of at least 1"),
    ("model.n_layers=2000000000", "the model's weights alone need"),
    ("model.d_model=2000000000", "the model's weights alone need"),
    ("model.d_ff=99999999999", "model.d_ff = 99999999999: expected 1 to 2147483647"),
    ("model.pad_token_id=4000000000", "model.pad_token_id = 4000000000: expected a token id"),
    ("model.dropout=1", "model.dropout = 1.0: expected a number of at least 0 and less than 1"),
    ("model.dropout=.nan", "model.dropout = .nan: expected a number of at least 0 and less than 1"),
    ("model.max_seq_len=1", "model.max_seq_len = 1: expected a whole number of at least 2"),
    ("model.vocab_size=many", "model.vocab_size = \"many\": expected a whole number of at least 2, or auto"),
    ("model.vocab_size=10", "config.yaml (by default): model.pad_token_id = 50256: expected a token id"),
    ("model.pad_token_id=-1", "model.pad_token_id = -1: expected a token id"),
    ("model.dmodel=3", "unknown key `model.dmodel`; did you mean `model.d_model`?"),
    ("modl.d_model=3", "unknown key `modl`; did you mean `model`?"),
    ("n_layers=3", "unknown key `n_layers`; did you mean `model.n_layers`?"),
    ("model.d_model.x=1", "model.d_model = {\"x\":1}: expected a whole number"),
    ("training.learning_rate=0", "training.learning_rate = 0.0: expected a number greater than 0"),
    ("training.learning_rate=.inf", "training.learning_rate = .inf: expected a number greater than 0"),
    ("training.learning_rate=fast", "training.learning_rate = \"fast\": expected a number greater than 0"),
    ("training.learning_rate=[", "--set training.learning_rate=[: not a YAML value"),
    (
        "training.min_lr=-1",
        "training.min_lr = -1.0: expected a number of at least 0 and at most training.learning_rate",
    ),
    (
        "training.min_lr=1",
        "--set training.min_lr=1: training.min_lr = 1.0 is above training.learning_rate = 0.003 (config.yaml): expected at most",
    ),
    (
        "training.min_lr=1e-4 --set training.learning_rate=1e-5",
        "training.min_lr = 0.0001 is above training.learning_rate = 1e-5 (--set training.learning_rate=1e-5): expected at most",
    ),
    ("training.lr_schedule=step", "training.lr_schedule = \"step\": expected one of linear, cosine, constant, wsd"),
    ("training.betas=[0.9]", "training.betas = [0.9]: expected two numbers of at least 0 and less than 1"),
    ("training.betas=[0.9,1]", "training.betas = [0.9,1.0]: expected two numbers"),
    ("training.per_gpu_batch_size=0", "training.per_gpu_batch_size = 0: expected a whole number of at least 1"),
    ("training.per_gpu_batch_size=18446744073709551615", "18446744073709551615 × 2 × 1 sequences overflow"),
    ("training.gradient_accumulation_steps=0", "training.gradient_accumulation_steps = 0: expected a whole number"),
    ("training.max_steps=0", "training.max_steps = 0: expected a whole number of at least 1, or null"),
    ("training.epochs=-1", "training.epochs = -1: expected a whole number of at least 1"),
    ("training.warmup_steps=1.5", "training.warmup_steps = 1.5: expected a whole number of at least 0"),
    ("training.amp_dtype=int8", "training.amp_dtype = \"int8\": expected one of bf16, fp16, fp32, fp64"),
    ("training.amp_dtype=fp16", "training.amp_dtype = \"fp16\" needs CUDA"),
    ("training.device=cuda:77", "CUDA devices can be used"),
    ("training.device=tpu", "training.device = \"tpu\": expected one of auto, cpu, cuda, cuda:N"),
    ("training.max_grad_norm=.nan", "training.max_grad_norm = .nan: expected a number of at least 0"),
    ("training.sample_prompt=7", "training.sample_prompt = 7: expected a text"),
    ("data.num_workers=1000000", "data.num_workers = 1000000: expected a whole number of at least 0 and at most 1024"),
    ("generation.top_p=0", "generation.top_p = 0.0: expected a number greater than 0 and at most 1"),
    ("generation.stop=[\"\"]", "generation.stop = [\"\"]: expected a list of texts that are not empty"),
    ("distributed.horovod_compression=zip", "horovod_compression = \"zip\": expected one of none, fp16, bf16"),
    ("seed=-1", "seed = -1: expected a whole number of at least 0"),
    ("seed", "--set seed: expected section.key=value, for example training.epochs=3"),
    ("training=3", "training is a section of keys, found 3"),
];

#[test]
fn settings_that_make_no_sense() {
    let mut lab = Lab::new();
    for (setting, message) in SETTINGS {
        lab.refuses(&format!("train --config config.yaml --set {setting}"), 2, message);
    }
    lab.finish();
}

#[test]
fn settings_that_cannot_be_met_here() {
    let mut lab = Lab::new();
    let cases = [
        ("training.global_batch_size=100000", "are 886 blocks of 8, too few for a global batch of 100000"),
        ("model.max_seq_len=100000", "too few for a global batch of 8"),
        ("training.init_from=nowhere", "checkpoint nowhere: there is no such folder"),
        ("training.init_from=data", "checkpoint data: neither a checkpoint nor a run with one"),
        ("data.data_dir=nowhere", "nowhere: no such folder; make it with `lm prepare"),
        ("data.data_dir=text.txt", "text.txt: no such folder"),
        ("paths.checkpoint_dir=text.txt", "cannot create text.txt: File exists"),
        ("paths.checkpoint_dir=text.txt/runs", "cannot create text.txt/runs: Not a directory"),
        ("paths.log_dir=text.txt", "cannot create text.txt/"),
        ("paths.tensorboard_dir=text.txt", "cannot create text.txt/"),
    ];
    for (setting, message) in cases {
        lab.refuses(&format!("train --config config.yaml --set {setting}"), 1, message);
    }
    lab.finish();
}

#[test]
fn files_that_are_no_configuration() {
    let mut lab = Lab::new();
    let cases: &[(&[u8], &str)] = &[
        (b"model: [1", "config.yaml: not valid YAML: did not find expected ',' or ']' at line 2"),
        (b"- a\n- b", "config.yaml: expected sections (model:, training:, "),
        (b"model: 3", "config.yaml: model is a section of keys, found 3"),
        (
            b"training:\n  epochs: 3\n  epochs: 4",
            "config.yaml: not valid YAML: training: duplicate entry with key \"epochs\"",
        ),
        (b"model:\n\td_model: 3", "config.yaml: not valid YAML: found character that cannot start any token at line 2"),
        (b"\xff\xfe\x00m", "cannot read the configuration config.yaml: stream did not contain valid UTF-8"),
        (b"&a [*a]", "config.yaml: not valid YAML: recursion limit exceeded"),
        (
            b"---\nmodel: {}\n---\nmodel: {}",
            "config.yaml: not valid YAML: deserializing from YAML containing more than one",
        ),
        (b"{1: 2}", "config.yaml: unknown key `1`; known keys: model, training, data"),
        (&[b'['; 20_000], "config.yaml: not valid YAML: recursion limit exceeded"),
        (&[b'x'; 20_000], "xxx\u{2026}\n"),
    ];
    for (text, message) in cases {
        let name = String::from_utf8_lossy(&text[..text.len().min(40)]).into_owned();
        let damage = |folder: &std::path::Path| fs::write(folder.join("config.yaml"), text).unwrap();
        lab.refuses_damaged(&name, damage, "train --config config.yaml", 2, message);
    }
    lab.refuses("train --config nowhere.yaml", 2, "cannot read the configuration nowhere.yaml: No such file");
    lab.refuses("train --config data", 2, "cannot read the configuration data: Is a directory");
    lab.finish();
}
