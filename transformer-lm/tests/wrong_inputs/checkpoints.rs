//! Checkpoints that are not whole, damaged, forged, or of another model.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::lab::{Damage, Lab, RUN, rewrite, run};

fn checkpoint(folder: &Path) -> PathBuf {
    folder.join(RUN).join("final_model")
}

fn file(folder: &Path, name: &str) -> PathBuf {
    checkpoint(folder).join(name)
}

/// Changes `state.json`.
fn state(folder: &Path, change: impl FnOnce(&mut Value)) {
    rewrite(file(folder, "state.json"), |bytes| {
        let mut state = serde_json::from_slice(&bytes).unwrap();
        change(&mut state);
        serde_json::to_vec(&state).unwrap()
    });
}

/// Changes a file, and its checksum with it.
fn forge(folder: &Path, name: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    rewrite(file(folder, name), change);
    let digest = Sha256::digest(fs::read(file(folder, name)).unwrap());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    state(folder, |state| state["files"][name] = digest.into());
}

/// Changes the header of a safetensors file.
fn forge_header(folder: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    forge(folder, name, |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let text = serde_json::to_vec(&header).unwrap();
        [&(text.len() as u64).to_le_bytes()[..], &text, &bytes[8 + length..]].concat()
    });
}

fn flip_last(mut bytes: Vec<u8>) -> Vec<u8> {
    *bytes.last_mut().unwrap() ^= 1;
    bytes
}

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// What nobody takes: neither training, be it on or from its weights, nor generating nor measuring.
const UNREADABLE: &[(&str, Damage, &str)] = &[
    ("no folder", |f| fs::remove_dir_all(checkpoint(f)).unwrap(), "there is no such folder"),
    ("empty state", |f| fs::write(file(f, "state.json"), "").unwrap(), "state.json is damaged: EOF"),
    (
        "state of another kind",
        |f| fs::write(file(f, "state.json"), "[1]").unwrap(),
        "format_version is none, this program reads 1",
    ),
    ("of the future", |f| state(f, |s| s["format_version"] = 7.into()), "format_version is 7, this program reads 1"),
    (
        "negative step",
        |f| state(f, |s| s["global_step"] = (-4).into()),
        "state.json is damaged: invalid value: integer `-4`",
    ),
    ("no model listed", |f| state(f, |s| s["files"] = json!({})), "state.json does not list model.safetensors"),
    (
        "escaping file",
        |f| state(f, |s| s["files"]["../x"] = "".into()),
        "lists \"../x\", which is not a file of this folder",
    ),
    ("no model", |f| fs::remove_file(file(f, MODEL)).unwrap(), "model.safetensors is missing"),
    ("no configuration", |f| fs::remove_file(file(f, "config.yaml")).unwrap(), "config.yaml is missing"),
    (
        "model cut",
        |f| rewrite(file(f, MODEL), |b| b[..b.len() - 9].to_vec()),
        "model.safetensors is damaged: its SHA-256",
    ),
    ("model flipped", |f| rewrite(file(f, MODEL), flip_last), "model.safetensors is damaged: its SHA-256"),
    ("optimizer flipped", |f| rewrite(file(f, OPTIMIZER), flip_last), "optimizer.safetensors is damaged: its SHA-256"),
    ("tokenizer flipped", |f| rewrite(file(f, "tokenizer.json"), flip_last), "tokenizer.json is damaged: its SHA-256"),
    (
        "forged garbage",
        |f| forge(f, MODEL, |_| vec![0xff; 64]),
        "model.safetensors: not a whole safetensors file (HeaderTooLarge)",
    ),
    (
        "forged and empty",
        |f| forge(f, MODEL, |_| Vec::new()),
        "model.safetensors: not a whole safetensors file (HeaderTooSmall)",
    ),
    (
        "forged name",
        |f| forge_header(f, MODEL, |h| h["x"] = h.as_object_mut().unwrap().remove("wte.weight").unwrap()),
        "`wte.weight` is missing",
    ),
    ("forged shape", |f| forge_header(f, MODEL, |h| h["wte.weight"]["shape"] = json!([16, 256])), "`wte.weight`"),
    (
        "vast shape",
        |f| forge_header(f, MODEL, |h| h["wte.weight"]["shape"] = json!([1u64 << 40, 1u64 << 40])),
        "not a whole safetensors file (ValidationOverflow)",
    ),
];

#[test]
fn unreadable_checkpoints() {
    let mut lab = Lab::new();
    for (name, damage, message) in UNREADABLE {
        for line in [
            "train --config config.yaml --set training.max_steps=6 --resume CHECKPOINT",
            "train --config config.yaml --set training.init_from=CHECKPOINT",
            "generate --prompt a --max_new_tokens 3 --checkpoint CHECKPOINT",
            "lm evaluate --checkpoint CHECKPOINT",
        ] {
            let line = line.replace("CHECKPOINT", &format!("{RUN}/final_model"));
            lab.refuses_damaged(&format!("{name}: {line}"), damage, &line, 1, message);
        }
    }
    lab.finish();
}

#[test]
fn checkpoints_that_training_cannot_go_on_from() {
    let mut lab = Lab::new();
    let cases: &[(&str, Damage, &str)] = &[
        ("no state", |f| fs::remove_file(file(f, "state.json")).unwrap(), "no checkpoint here: state.json is missing"),
        ("no optimizer", |f| fs::remove_file(file(f, OPTIMIZER)).unwrap(), "optimizer.safetensors is missing"),
        (
            "forged optimizer",
            |f| forge(f, OPTIMIZER, |_| vec![0xff; 64]),
            "optimizer.safetensors: not a whole safetensors file",
        ),
        (
            "optimizer of another model",
            |f| {
                forge_header(f, OPTIMIZER, |h| {
                    h["step.x"] = h.as_object_mut().unwrap().remove("step.wte.weight").unwrap()
                })
            },
            "optimizer.safetensors: ",
        ),
        (
            "moments of another shape",
            |f| forge_header(f, OPTIMIZER, |h| h["exp_avg.wte.weight"]["shape"] = json!([16, 256])),
            "`exp_avg.wte.weight` in the optimizer's state is ",
        ),
        (
            "position after the epoch",
            |f| state(f, |s| s["step"] = 4000.into()),
            "state.json is damaged: 0 epochs of 110 updates and 4000 more are not 4",
        ),
        (
            "vast epoch",
            |f| state(f, |s| s["epoch"] = u64::MAX.into()),
            "state.json is damaged: 18446744073709551615 epochs of 110",
        ),
        (
            "no epoch",
            |f| state(f, |s| s["batches_per_epoch"] = 0.into()),
            "state.json is damaged: 0 epochs of 0 updates",
        ),
    ];
    let line = format!("train --config config.yaml --set training.max_steps=6 --resume {RUN}/final_model");
    for (name, damage, message) in cases {
        lab.refuses_damaged(name, damage, &line, 1, message);
    }
    lab.finish();
}

#[test]
fn settings_of_another_run() {
    let mut lab = Lab::new();
    let cases = [
        ("model.d_model=32", 1, "`wte.weight` is Float [256, 16], the configuration asks for Float [256, 32]"),
        ("model.n_layers=3", 1, "`h.2.ln_1.weight` is missing; was it trained with another `model` section?"),
        ("training.amp_dtype=fp64", 1, "the configuration asks for Double"),
        ("data.data_dir=chars", 1, "the configuration asks for Float ["),
        ("training.global_batch_size=24", 2, "sequences per update was 8 in the checkpoint and is 24 now"),
        (
            "model.max_seq_len=16",
            2,
            "updates per epoch (the data or max_seq_len) was 110 in the checkpoint and is 55 now",
        ),
        (
            "seed=7",
            2,
            "cannot resume at the very step: seed was 42 in the checkpoint and is 7 now\nhint: set seed to 42 again",
        ),
        ("training.global_batch_size=24", 2, "hint: set training.global_batch_size to 8"),
        ("model.max_seq_len=16", 2, "hint: take the data and model.max_seq_len of the run's config_used.yaml"),
    ];
    for (setting, code, message) in cases {
        lab.refuses(&format!("train --config config.yaml --resume {RUN}/final_model --set {setting}"), code, message);
    }
    lab.finish();
}

#[test]
fn generating_with_files_that_do_not_fit() {
    let mut lab = Lab::new();
    let cases: &[(&str, Damage, i32, &str)] = &[
        (
            "another configuration",
            |f| forge(f, "config.yaml", |_| b"model: {d_model: 16, n_heads: 2, vocab_size: 65536}".into()),
            1,
            "`wte.weight` has shape [256, 16], the configuration's model has [65536, 16]",
        ),
        ("no configuration", |f| forge(f, "config.yaml", |_| b"[".into()), 2, "config.yaml: not valid YAML"),
        (
            "another tokenizer",
            |f| forge(f, "tokenizer.json", |_| br#"{"kind":"gpt2"}"#.into()),
            1,
            "a vocabulary of 256 for a tokenizer of 50257",
        ),
    ];
    for (name, damage, code, message) in cases {
        lab.refuses_damaged(name, damage, &format!("generate --checkpoint {RUN}/final_model"), *code, message);
    }
    lab.finish();
}

/// What cannot be read is passed over, said, and kept.
#[test]
fn resume_auto_passes_over_what_is_damaged() {
    let lab = Lab::new();
    let folder = lab.folder();
    for name in ["final_model", "best_model"] {
        fs::write(folder.path().join(RUN).join(name).join(MODEL), "x").unwrap();
    }
    fs::write(folder.path().join(RUN).join("checkpoint_epoch1_step4/state.json"), "{").unwrap();
    let output = run(folder.path(), "train --config config.yaml --run_name run --resume auto");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(said.matches("resume: skipped ").count(), 3, "{said}");
    assert!(said.contains("checkpoint_epoch1_step2") && said.contains("steps: 2 of 4 updates done"), "{said}");
    let kept = |name: &str| fs::read(folder.path().join(RUN).join("superseded").join(name)).unwrap();
    assert_eq!(kept("checkpoint_epoch1_step4/state.json"), b"{");
    for name in ["final_model", "best_model"] {
        transformer_lm::checkpoint::verify(&folder.path().join(RUN).join(name)).unwrap();
    }
}
