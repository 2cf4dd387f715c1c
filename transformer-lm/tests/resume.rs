//! Training in one process: what it leaves behind, and going on from any of its checkpoints to the bit.

use std::path::{Path, PathBuf};

use transformer_lm::Config;
use transformer_lm::config::AmpDtype;
use transformer_lm::data::{PrepareOptions, TokenizerKind, prepare};
use transformer_lm::trainer::{Precision, Resume, Summary, run_distributed_training};

struct Lab {
    folder: tempfile::TempDir,
    config: Config,
}

/// 30 updates of a tiny model with dropout, accumulation and clipping; an epoch has 22.
fn lab() -> Lab {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..300).map(|i| ["king ", "queen ", "crown "][i * i % 7 % 3]).collect();
    std::fs::write(folder.path().join("text.txt"), text).unwrap();
    let data = folder.path().join("data");
    let options = PrepareOptions {
        input: vec![folder.path().join("text.txt")],
        tokenizer: TokenizerKind::Byte,
        output: data.clone(),
        ..PrepareOptions::default()
    };
    prepare(&options).unwrap();
    let text = format!(
        "model: {{d_model: 16, n_heads: 2, n_layers: 2, d_ff: 32, dropout: 0.1, max_seq_len: 8, vocab_size: auto}}\n\
         training: {{max_steps: 30, per_gpu_batch_size: 2, global_batch_size: 8, learning_rate: 0.01, warmup_steps: 5, \
         log_interval: 3, eval_interval: 10, save_interval: 7, keep_checkpoints: 0, max_grad_norm: 0.5, amp_dtype: fp32, \
         device: cpu}}\n\
         data: {{data_dir: {}}}",
        data.display()
    );
    let config = Config::from_yaml(&text, "test").unwrap();
    Lab { folder, config }
}

impl Lab {
    fn train(&self, output: &str, resume: Option<Resume>) -> transformer_lm::Result<Summary> {
        let mut config = self.config.clone();
        config.paths.checkpoint_dir = self.path(output);
        run_distributed_training(&config, resume.as_ref(), "run")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A copy of the finished run in which only the checkpoint `kept` stands; `metrics.csv` is whole.
    fn rewound(&self, run: &Path, output: &str, kept: &[&str]) -> PathBuf {
        let copy = self.path(output).join(run.file_name().unwrap());
        std::fs::create_dir_all(&copy).unwrap();
        for name in ["metrics.csv", "run_metadata.json"].iter().chain(kept) {
            copy_all(&run.join(name), &copy.join(name));
        }
        copy
    }
}

fn copy_all(from: &Path, to: &Path) {
    if from.is_file() {
        std::fs::copy(from, to).unwrap();
        return;
    }
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        copy_all(&entry.path(), &to.join(entry.file_name()));
    }
}

/// The columns that must not differ between equal runs.
fn rows(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.csv")).unwrap();
    text.lines().map(|line| line.split(',').take(8).collect::<Vec<_>>().join(",")).collect()
}

/// The losses of training and validation, in order.
fn losses(run: &Path) -> Vec<f64> {
    rows(run).iter().skip(1).map(|row| row.split(',').nth(5).unwrap().parse().unwrap()).collect()
}

fn names(run: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(run).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn assert_same_end(run: &Path, other: &Path) {
    assert_eq!(rows(run), rows(other));
    for checkpoint in ["final_model", "best_model"] {
        for file in ["model.safetensors", "optimizer.safetensors", "tokenizer.json"] {
            let read = |run: &Path| std::fs::read(run.join(checkpoint).join(file)).unwrap();
            assert!(read(run) == read(other), "{checkpoint}/{file} differs");
        }
    }
}

#[test]
fn resumes_to_the_bit_from_any_checkpoint() {
    let lab = lab();
    let run = lab.train("undisturbed", None).unwrap().run.unwrap();
    let steps =
        ["checkpoint_epoch1_step7", "checkpoint_epoch1_step14", "checkpoint_epoch1_step21", "checkpoint_epoch2_step28"];
    let mut expected: Vec<&str> = ["best_model", "checkpoint_epoch1", "final_model"].into();
    expected.extend(steps);
    expected.extend([
        "config_used.yaml",
        "metrics.csv",
        "metrics.jsonl",
        "run.lock",
        "run_metadata.json",
        "tensorboard",
    ]);
    expected.sort();
    assert_eq!(names(&run), expected);

    for kept in
        [&[][..], &steps[..1], &["checkpoint_epoch1"], &["best_model"], &["final_model", "best_model"], &steps[..3]]
    {
        // `best_model` goes on standing where it is not written again.
        let output = format!("from-{}", kept.join("-"));
        let copy = lab.rewound(&run, &output, kept);
        let summary = lab.train(&output, Some(Resume::Auto)).unwrap();
        assert_eq!(summary.run.as_deref(), Some(&*copy));
        assert_same_end(&run, &copy);
    }
}

#[test]
fn a_run_that_another_training_writes_into_is_refused() {
    let mut lab = lab();
    lab.config.training.max_steps = Some(2);
    let run = lab.train("runs", None).unwrap().run.unwrap();
    lab.config.training.max_steps = Some(4);
    let unfinished = run.join(".tmp-checkpoint_epoch1_step3-77");
    std::fs::create_dir(&unfinished).unwrap();
    let held = transformer_lm::metrics::RunLock::take(&run).unwrap();
    for resume in [Resume::Auto, Resume::Path(run.clone()), Resume::Path(run.join("final_model"))] {
        let error = lab.train("runs", Some(resume)).unwrap_err();
        let (said, name) = (error.to_string(), run.file_name().unwrap().to_string_lossy());
        assert!(said.contains("another training is writing") && said.contains(&*name), "{said}");
        assert_eq!(error.exit_code(), 1);
        assert!(unfinished.exists() && run.join("final_model").exists());
    }
    drop(held);
    assert_eq!(lab.train("runs", Some(Resume::Auto)).unwrap().global_step, 4);
    assert!(!unfinished.exists());
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let lab = lab();
    let run = lab.train("undisturbed", None).unwrap().run.unwrap();
    let copy = lab.rewound(&run, "damaged", &["checkpoint_epoch1_step7", "checkpoint_epoch1_step14"]);
    let weights = copy.join("checkpoint_epoch1_step14/model.safetensors");
    let half = std::fs::metadata(&weights).unwrap().len() / 2;
    std::fs::File::options().write(true).open(&weights).unwrap().set_len(half).unwrap();
    std::fs::create_dir(copy.join(".tmp-checkpoint_epoch1_step21-77")).unwrap();

    let asked = Resume::Path(copy.join("checkpoint_epoch1_step14"));
    let message = lab.train("damaged", Some(asked)).unwrap_err().to_string();
    assert!(message.contains("model.safetensors is damaged"), "{message}");

    lab.train("damaged", Some(Resume::Auto)).unwrap();
    assert_same_end(&run, &copy);
    let aside = copy.join("superseded");
    assert_eq!(names(&aside), ["checkpoint_epoch1_step14"]);
    std::fs::remove_dir_all(aside).unwrap();
    assert_eq!(names(&run), names(&copy));
}

#[test]
fn what_cannot_be_resumed_is_refused_with_the_reason() {
    let mut lab = lab();
    let refusal = |lab: &Lab, path: PathBuf| lab.train("refused", Some(Resume::Path(path))).unwrap_err().to_string();
    let missing = refusal(&lab, lab.path("no/such"));
    assert!(missing.contains("no/such: there is no such folder"), "{missing}");
    let empty = refusal(&lab, lab.path("data"));
    assert!(empty.contains("state.json is missing"), "{empty}");

    let run = lab.train("undisturbed", None).unwrap().run.unwrap();
    let before = rows(&run);
    let last = run.join("final_model");
    lab.config.seed.0 += 1;
    assert!(refusal(&lab, last.clone()).contains("seed was 42 in the checkpoint and is 43 now"));
    lab.config.seed.0 -= 1;
    lab.config.training.global_batch_size = Some(4);
    assert!(refusal(&lab, last.clone()).contains("sequences per update was 8"));
    lab.config.training.global_batch_size = Some(8);
    lab.config.model.d_ff = 64;
    assert!(refusal(&lab, last).contains("was it trained with another `model` section?"));
    assert_eq!(rows(&run), before);
}

#[test]
fn an_impossible_run_is_refused_before_it_leaves_a_trace() {
    let mut lab = lab();
    lab.config.model.vocab_size = transformer_lm::config::VocabSize::Fixed(100);
    let message = lab.train("none", None).unwrap_err().to_string();
    assert!(message.contains("model.vocab_size = 100, but the data"), "{message}");
    lab.config.model.vocab_size = transformer_lm::config::VocabSize::Auto;
    lab.config.training.amp_dtype = transformer_lm::config::AmpDtype::Fp16;
    let message = lab.train("none", None).unwrap_err().to_string();
    assert!(message.contains("fp16 needs CUDA"), "{message}");
    lab.config.data.data_dir = lab.path("nowhere");
    let message = lab.train("none", None).unwrap_err().to_string();
    assert!(message.contains("nowhere: no such folder"), "{message}");
    assert!(!lab.path("none").exists());
}

#[test]
fn a_vocabulary_that_is_left_out_is_that_of_the_data() {
    let lab = lab();
    let text = format!(
        "model: {{d_model: 16, n_heads: 2, n_layers: 1, d_ff: 32, max_seq_len: 8}}\n\
         training: {{max_steps: 1, amp_dtype: fp32, device: cpu}}\n\
         data: {{data_dir: {}}}\npaths: {{checkpoint_dir: {}}}",
        lab.path("data").display(),
        lab.path("runs").display()
    );
    let config = Config::from_yaml(&text, "test").unwrap();
    let run = run_distributed_training(&config, None, "run").unwrap().run.unwrap();
    for file in ["config_used.yaml", "final_model/config.yaml"] {
        let kept = transformer_lm::load_config(run.join(file)).unwrap().model;
        assert_eq!(kept.vocab_size, transformer_lm::config::VocabSize::Fixed(256), "{file}");
        assert_eq!(kept.pad_token_id, None, "{file}");
    }
}

#[test]
fn what_is_computed_twice_changes_nothing() {
    for dtype in [AmpDtype::Fp32, AmpDtype::Bf16] {
        let mut lab = lab();
        lab.config.training.amp_dtype = dtype;
        let kept = lab.train("kept", None).unwrap().run.unwrap();
        lab.config.training.gradient_checkpointing = true;
        let recomputed = lab.train("recomputed", None).unwrap().run.unwrap();
        assert_same_end(&kept, &recomputed);
        let copy = lab.rewound(&recomputed, "resumed", &["checkpoint_epoch1_step14"]);
        lab.train("resumed", Some(Resume::Auto)).unwrap();
        assert_same_end(&recomputed, &copy);
    }
}

/// What dropout drops of a sequence does not depend on the others that are computed with it.
#[test]
fn micro_batches_of_another_size_change_nothing_but_rounding() {
    let mut lab = lab();
    lab.config.training.amp_dtype = AmpDtype::Fp64;
    let small = lab.train("small", None).unwrap().run.unwrap();
    let expected = losses(&small);
    lab.config.training.per_gpu_batch_size = 8;
    let large = lab.train("large", None).unwrap().run.unwrap();
    let resumed = lab.rewound(&small, "resumed", &["checkpoint_epoch1_step14"]);
    lab.train("resumed", Some(Resume::Auto)).unwrap();
    for run in [large, resumed] {
        let found = losses(&run);
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-9), "{found:?} {expected:?}");
    }
}

#[test]
fn every_update_has_masks_of_its_own() {
    let mut lab = lab();
    let training = &mut lab.config.training;
    (training.overfit_one_batch, training.learning_rate, training.log_interval) = (true, 1e-30, 1);
    (training.max_steps, training.eval_interval) = (Some(3), 0);
    let losses = losses(&lab.train("runs", None).unwrap().run.unwrap());
    assert!(losses[0] != losses[1] && losses[1] != losses[2] && losses[2] != losses[0], "{losses:?}");
    lab.config.model.dropout = 0.0;
    let losses = self::losses(&lab.train("without", None).unwrap().run.unwrap());
    assert!(losses[0] == losses[1] && losses[1] == losses[2], "{losses:?}");
}

#[test]
fn going_on_before_later_checkpoints_sets_them_aside() {
    let mut lab = lab();
    lab.config.training.keep_checkpoints = 2;
    let run = lab.train("runs", None).unwrap().run.unwrap();
    let copy = lab.rewound(
        &run,
        "copy",
        &["checkpoint_epoch1_step21", "checkpoint_epoch2_step28", "best_model", "final_model"],
    );
    let started = Resume::Path(copy.join("checkpoint_epoch1_step21"));
    lab.config.training.max_steps = Some(23);
    lab.train("copy", Some(started)).unwrap();
    assert_eq!(names(&copy.join("superseded")), ["best_model", "checkpoint_epoch2_step28", "final_model"]);
    assert!(copy.join("checkpoint_epoch1_step21").exists() && copy.join("final_model").exists());
}

#[test]
fn training_ends_when_the_validation_loss_no_longer_falls() {
    let mut lab = lab();
    lab.config.training.early_stopping_patience = Some(2);
    lab.config.training.eval_interval = 1;
    lab.config.training.learning_rate = 0.05; // too high to settle
    let summary = lab.train("early", None).unwrap();
    let run = summary.run.unwrap();
    assert!(summary.global_step < 30, "{}", summary.global_step);
    let losses: Vec<f64> = rows(&run)
        .iter()
        .filter(|row| row.starts_with("val"))
        .map(|row| row.split(',').nth(5).unwrap().parse().unwrap())
        .collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses.iter().position(|loss| *loss == best).unwrap(), losses.len() - 3);
    assert!(run.join("final_model").exists());
    let rewound = lab.rewound(&run, "again", &["final_model"]);
    assert_eq!(lab.train("again", Some(Resume::Path(rewound))).unwrap().global_step, summary.global_step);
}

#[test]
fn updates_that_are_not_finite_are_skipped_and_then_end_training() {
    let mut lab = lab();
    lab.config.training.learning_rate = 1e30;
    lab.config.training.max_grad_norm = 0.0;
    lab.config.training.max_skipped_in_a_row = 4;
    let message = lab.train("skipped", None).unwrap_err().to_string();
    assert!(message.contains("5 updates in a row had to be skipped") && message.contains("hint: lower"), "{message}");
}

/// Settings with which the first update ruins the weights, and all later ones are skipped.
fn ruin(lab: &mut Lab) {
    let training = &mut lab.config.training;
    (training.learning_rate, training.warmup_steps) = (1e30, 0);
    training.lr_schedule = transformer_lm::config::LrSchedule::Constant;
    (training.save_interval, training.eval_interval, training.keep_checkpoints) = (1, 2, 1);
}

/// Every checkpoint of the run whose weights give a finite loss.
fn assert_all_usable(run: &Path) -> Vec<String> {
    let mut checkpoints = names(run);
    checkpoints.retain(|name| name.starts_with("checkpoint_") || name.ends_with("_model"));
    for name in &checkpoints {
        let figures = evaluated(&["--checkpoint".as_ref(), run.join(name).as_os_str()]);
        assert!(figures["loss"].as_f64().is_some_and(f64::is_finite), "{name}: {figures}");
    }
    checkpoints
}

#[test]
fn a_diverged_run_keeps_what_is_usable_and_names_it() {
    let mut lab = lab();
    lab.config.training.save_interval = 5;
    lab.config.training.max_steps = Some(10);
    let run = lab.train("runs", None).unwrap().run.unwrap();
    let healthy = lab.config.clone();
    // Not from the last one, so that the first update, which is finite still, is saved on its own.
    std::fs::remove_dir_all(run.join("final_model")).unwrap();
    ruin(&mut lab);
    lab.config.training.max_steps = Some(60);
    let message = lab.train("runs", Some(Resume::Auto)).unwrap_err().to_string();
    assert!(message.contains("11 updates in a row had to be skipped"), "{message}");
    assert_eq!(assert_all_usable(&run), ["best_model", "checkpoint_epoch1_step10"]);
    assert_eq!(names(&run.join("superseded")), ["checkpoint_epoch1_step11"]);

    // The hint can be followed.
    let (_, named) = message.split_once("--resume ").unwrap();
    lab.config = healthy;
    lab.config.training.max_steps = Some(12);
    assert_eq!(lab.train("runs", Some(Resume::Path(named.into()))).unwrap().global_step, 12);
}

#[test]
fn a_loss_that_is_not_finite_is_never_the_best() {
    let mut lab = lab();
    ruin(&mut lab);
    let message = lab.train("runs", None).unwrap_err().to_string();
    assert!(message.contains("there is no checkpoint that is usable"), "{message}");
    let run = std::fs::read_dir(lab.path("runs")).unwrap().next().unwrap().unwrap().path();
    assert_eq!(assert_all_usable(&run), [""; 0]);
    // Training that comes to its end so has no result either.
    lab.config.training.max_steps = Some(4);
    let message = lab.train("short", None).unwrap_err().to_string();
    assert!(message.contains("final_model was not saved"), "{message}");
}

#[test]
fn a_checkpoint_that_was_due_at_a_skipped_update_is_saved_after_the_next() {
    let mut lab = lab();
    let training = &mut lab.config.training;
    // Once the window of the guard is full, whatever is above its mean is skipped.
    (training.skip_outliers_z, training.max_skipped_in_a_row, training.max_steps) = (1e-9, 1000, Some(160));
    (training.save_interval, training.eval_interval, training.log_interval) = (2, 0, 1);
    lab.config.model.dropout = 0.8; // the loss goes up and down, and hardly falls
    let run = lab.train("runs", None).unwrap().run.unwrap();
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let skipped = |step: u64| {
        let row = rows.iter().find(|row| row["phase"] == "train" && row["global_step"] == step);
        row.map_or(0, |row| row["skipped"].as_u64().unwrap())
    };
    let validated = |step: u64| rows.iter().any(|row| row["phase"] == "val" && row["global_step"] == step);
    let (mut expected, mut overdue, mut withheld) = (Vec::new(), false, 0);
    for step in 1..=160 {
        let due = overdue || step % 2 == 0;
        let usable = skipped(step) == skipped(step - 1) || validated(step);
        expected.extend((due && usable).then_some(step));
        withheld += u64::from(due && !usable);
        overdue = due && !usable;
    }
    let saved = names(&run).into_iter().filter_map(|name| name.split_once("_step")?.1.parse().ok());
    let mut saved: Vec<u64> = saved.collect();
    saved.sort();
    assert!(withheld > 0, "none was due at a skipped update");
    assert_eq!(saved, expected);
}

#[test]
fn the_record_holds_every_figure_and_a_sample() {
    let lab = lab();
    let run = lab.train("record", None).unwrap().run.unwrap();
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |phase: &str| lines.iter().filter(|line| line["phase"] == phase).collect::<Vec<_>>();
    for row in of("train") {
        for name in ["loss", "lr", "grad_norm", "step_ms", "mfu", "memory_bytes", "waiting", "throughput"] {
            assert!(row[name].as_f64().is_some_and(|value| value > 0.0), "{name}: {row}");
        }
        assert_eq!(row["skipped"], 0);
    }
    for row in of("val") {
        // Of bytes each is one: bits are nats over ln 2.
        let bits = row["loss"].as_f64().unwrap() / std::f64::consts::LN_2;
        assert!((row["bits_per_byte"].as_f64().unwrap() - bits).abs() < 1e-9 && row["tokens"] == 175, "{row}");
    }
    assert_eq!(of("sample").len(), of("val").len());
    assert!(of("sample").iter().all(|line| !line["text"].as_str().unwrap().is_empty()));
    assert_eq!(rows(&run).len() - 1, of("train").len() + of("val").len());
    let starts = std::fs::read_to_string(run.join("run_metadata.json")).unwrap();
    let starts: serde_json::Value = serde_json::from_str(&starts).unwrap();
    let time = starts[0]["time"].as_str().unwrap();
    assert!(time.len() == "2026-11-22T05:06:07+00:00".len(), "RFC 3339: {time}");
    time.parse::<jiff::Timestamp>().unwrap();
}

/// The figures that `lm evaluate --json` prints.
fn evaluated(args: &[&std::ffi::OsStr]) -> serde_json::Value {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lm"));
    let output = command.args(["evaluate", "--json"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_checkpoint_measured_again_has_the_figures_of_training() {
    let lab = lab();
    let run = lab.train("measured", None).unwrap().run.unwrap();
    let recorded = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut rows = recorded.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let last = rows.rfind(|row| row["phase"] == "val").unwrap();
    let checkpoint = run.join("final_model");
    let data = lab.path("data");
    let figures = evaluated(&["--checkpoint".as_ref(), checkpoint.as_os_str(), "--data".as_ref(), data.as_os_str()]);
    for name in ["loss", "perplexity", "accuracy", "bits_per_byte", "tokens"] {
        let (now, then) = (figures[name].as_f64().unwrap(), last[name].as_f64().unwrap());
        assert!((now - then).abs() <= 1e-6 * then, "{name}: {now} {then}");
    }
    let train = evaluated(&["--checkpoint".as_ref(), run.as_os_str(), "--part".as_ref(), "train".as_ref()]);
    assert!(train["tokens"].as_f64().unwrap() > 1000.0 && train["loss"] != figures["loss"]);
}

#[test]
fn a_new_run_may_start_with_the_weights_of_another() {
    let mut lab = lab();
    let first = lab.train("first", None).unwrap();
    let best = first.best_val_loss.unwrap();
    lab.config.training.init_from = first.run;
    lab.config.training.learning_rate = 1e-9;
    lab.config.training.max_steps = Some(1);
    let tuned = lab.train("tuned", None).unwrap();
    assert!((tuned.best_val_loss.unwrap() - best).abs() < 1e-4, "{:?} {best}", tuned.best_val_loss);
    lab.config.training.init_from = Some(lab.path("nowhere"));
    assert!(lab.train("tuned", None).unwrap_err().to_string().contains("nowhere: there is no such folder"));
}

#[test]
fn one_batch_can_be_learnt_by_heart() {
    let mut lab = lab();
    lab.config.training.overfit_one_batch = true;
    lab.config.training.max_steps = Some(150);
    lab.config.training.lr_schedule = transformer_lm::config::LrSchedule::Constant;
    lab.config.model.dropout = 0.0;
    lab.config.training.early_stopping_patience = Some(1); // of what is held out it knows less and less, which must not end it
    let summary = lab.train("one", None).unwrap();
    assert!(summary.global_step == 150 && summary.loss.unwrap() < 0.5, "{summary:?}");
}

fn train_command(lab: &Lab, sets: &[&str], flags: &[&str]) -> std::process::Output {
    let config = lab.path("config.yaml");
    lab.config.save(&config).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_train"));
    command.arg("--config").arg(config).arg("--output-dir").arg(lab.path("commanded"));
    command.args(sets.iter().flat_map(|set| ["--set", set])).args(flags).output().unwrap()
}

#[test]
fn a_plan_is_told_and_nothing_is_written() {
    let lab = lab();
    let output = train_command(&lab, &[], &["--dry-run"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let parts = [
        "8,704",
        "8 sequences = 1 rank x 4 micro-batches x 2; 64 tokens",
        "30 of which 24 are an epoch",
        "s an update",
    ];
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    assert!(!lab.path("commanded").exists());
    let output = train_command(&lab, &["training.global_batch_size=100000"], &["--dry-run"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("too few for an update"));
}

#[test]
fn a_plan_needs_no_data() {
    let lab = lab();
    let missing = ["data.data_dir=no/data", "model.vocab_size=50304"];
    let plan = |more: &str| {
        let output = train_command(&lab, &[&missing[..], &[more]].concat(), &["--dry-run"]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let text = plan("training.max_steps=30");
    for part in [
        "no/data is missing, a vocabulary of 50304 assumed",
        "`lm prepare --input FILE… --tokenizer gpt2 --output no/data`",
        "8 sequences = 1 rank x 4 micro-batches x 2; 64 tokens",
        "updates          30; how many are an epoch, the data will tell",
        "h in all",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = plan("training.max_steps=null");
    assert!(text.contains("as the data will tell") && !text.contains("in all"), "{text}");
    let output = train_command(&lab, &missing, &[]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("--tokenizer byte|char|gpt2|bpe --output no/data"), "{error}");
}

/// The most memory of a training whose activations are far larger than its weights.
fn memory(lab: &Lab, checkpointing: &str) -> f64 {
    let shape = ["model.d_model=64", "model.n_heads=4", "model.n_layers=24", "model.d_ff=256", "model.max_seq_len=128"];
    let batch = [
        "training.global_batch_size=8",
        "training.per_gpu_batch_size=8",
        "training.max_steps=2",
        "training.log_interval=1",
    ];
    let sets = [&shape[..], &batch[..], &[checkpointing]].concat();
    let output = train_command(lab, &sets, &["--run-name", checkpointing]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let mib = text.lines().rev().find_map(|line| line.split(" | ").find_map(|part| part.strip_suffix(" MiB"))).unwrap();
    mib.replace(',', "").parse().unwrap()
}

#[test]
fn computing_twice_saves_most_of_the_activations() {
    let lab = lab();
    let (kept, twice) =
        (memory(&lab, "training.gradient_checkpointing=false"), memory(&lab, "training.gradient_checkpointing=true"));
    let floor = memory(&lab, "training.per_gpu_batch_size=1"); // nearly without activations
    assert!(twice - floor < 0.5 * (kept - floor), "{kept} MiB kept, {twice} MiB computed twice, {floor} MiB without");
}

#[test]
fn bf16_stays_close_to_fp32() {
    let mut lab = lab();
    let exact = lab.train("fp32", None).unwrap().loss.unwrap();
    lab.config.training.amp_dtype = AmpDtype::Bf16;
    let close = lab.train("bf16", None).unwrap().loss.unwrap();
    // Where the processor has no bf16 arithmetic, fp32 takes its place.
    let precision = Precision::new(AmpDtype::Bf16, tch::Device::Cpu).unwrap();
    assert_eq!(exact != close, precision.of_products() == tch::Kind::BFloat16, "{exact} {close}");
    assert!((exact - close).abs() < 0.05, "{exact} {close}");
}
