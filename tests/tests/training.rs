//! The trainer as users run it: several processes, killed, resumed, and the same answer from any number of ranks.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hvd_tests::{Job, Launcher, binary, seed};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A folder with prepared data and a configuration, for one test.
struct Lab {
    folder: tempfile::TempDir,
}

/// Columns of `metrics.csv` that must not differ between equal runs.
#[derive(Debug, PartialEq, Clone)]
struct Row {
    phase: String,
    step: u64,
    loss: String,
}

impl Lab {
    fn new() -> Self {
        let lab = Lab { folder: tempfile::tempdir().expect("a temporary folder") };
        std::fs::write(lab.path("text.txt"), text()).expect("a text");
        let data = lab.path("data");
        let args = ["prepare", "--tokenizer", "byte", "--val-fraction", "0.1", "--input"].map(PathBuf::from);
        let args = args.into_iter().chain([lab.path("text.txt"), "--output".into(), data]);
        Job::new(binary("lm"), 1).args(args).run().assert_success();
        std::fs::write(lab.path("config.yaml"), lab.config()).expect("a configuration");
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> String {
        let folder = self.folder.path().display();
        format!(
            "model: {{d_model: 32, n_heads: 2, n_layers: 2, d_ff: 64, dropout: 0.1, max_seq_len: 16, vocab_size: auto}}\n\
             training: {{max_steps: 100, per_gpu_batch_size: 4, global_batch_size: 24, learning_rate: 0.003, \
             warmup_steps: 10, max_grad_norm: 0.5, log_interval: 1, save_interval: 20, eval_interval: 50, amp_dtype: fp32}}\n\
             data: {{data_dir: {folder}/data}}\n\
             paths: {{checkpoint_dir: {folder}/runs}}\n"
        )
    }

    /// A training job whose run goes to `output`.
    fn train(&self, ranks: usize, output: &str, sets: &[&str]) -> Job {
        let sets = sets.iter().flat_map(|set| ["--set".to_string(), set.to_string()]);
        let output = self.path(output);
        Job::new(binary("train"), ranks)
            .args(["--config".into(), self.path("config.yaml")])
            .args(["--run_name".into(), "run".into(), "--output_dir".into(), output.into_os_string()])
            .args(sets)
            // Without a launcher nobody can know of a rank that dies before the others have met it.
            .var("HVD_START_TIMEOUT", 6)
            .limit(Duration::from_secs(300))
    }

    /// The one run folder in `output`.
    fn run_folder(&self, output: &str) -> PathBuf {
        let entries = std::fs::read_dir(self.path(output)).expect("an output folder");
        let mut folders: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
        assert_eq!(folders.len(), 1, "expected one run folder: {folders:?}");
        folders.remove(0)
    }

    fn metrics(&self, output: &str) -> Vec<Row> {
        let path = self.run_folder(output).join("metrics.csv");
        let text = std::fs::read_to_string(path).expect("metrics.csv");
        let mut lines = text.lines();
        let header = lines.next().expect("a header");
        assert_eq!(header, "phase,epoch,update,global_step,lr,loss,perplexity,accuracy,throughput,wall_time");
        let row = |line: &str| {
            let cells: Vec<_> = line.split(',').collect();
            Row { phase: cells[0].into(), step: cells[3].parse().expect("a step"), loss: cells[5].into() }
        };
        lines.map(row).collect()
    }

    fn train_losses(&self, output: &str) -> Vec<f64> {
        let rows = self.metrics(output).into_iter().filter(|row| row.phase == "train");
        rows.map(|row| row.loss.parse().expect("a loss")).collect()
    }

    fn weights(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.run_folder(output).join("final_model/model.safetensors")).expect("final weights")
    }

    fn moments(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.run_folder(output).join("final_model/optimizer.safetensors")).expect("final moments")
    }
}

/// About 40 kB with enough structure to learn from.
fn text() -> String {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let words = ["king", "queen", "speaks", "to", "the", "crown", "and", "sword", "of", "night", "thou", "art"];
    (0..8000).map(|_| words[random.random_range(0..words.len())]).collect::<Vec<_>>().join(" ")
}

fn assert_close(losses: &[f64], reference: &[f64], tolerance: f64, what: &str) {
    assert_eq!(losses.len(), reference.len(), "{what}");
    for (step, (loss, expected)) in losses.iter().zip(reference).enumerate() {
        assert!((loss - expected).abs() <= tolerance * expected, "{what}, step {}: {loss} {expected}", step + 1);
    }
}

fn assert_same_on_any_number_of_ranks(amp_dtype: &str, tolerance: f64) {
    let lab = Lab::new();
    let set = format!("training.amp_dtype={amp_dtype}");
    for ranks in [1, 2, 3, 4, 8] {
        lab.train(ranks, &format!("ranks{ranks}"), &[&set]).run().assert_success();
    }
    let reference = lab.train_losses("ranks1");
    assert_eq!(reference.len(), 100);
    assert!(reference[0] - reference[99] > 1.0, "the loss fell from {} to {} only", reference[0], reference[99]);
    for ranks in [2, 3, 4, 8] {
        assert_close(&lab.train_losses(&format!("ranks{ranks}")), &reference, tolerance, &format!("{ranks} ranks"));
    }
}

#[test]
fn fp64_gives_the_same_losses_on_any_number_of_ranks() {
    assert_same_on_any_number_of_ranks("fp64", 1e-9);
}

#[test]
fn fp32_gives_the_same_losses_on_any_number_of_ranks() {
    assert_same_on_any_number_of_ranks("fp32", 1e-4);
}

#[test]
fn the_same_command_twice_gives_the_same_bits() {
    let lab = Lab::new();
    for output in ["first", "second"] {
        lab.train(2, output, &[]).run().assert_success();
    }
    assert_eq!(lab.metrics("first"), lab.metrics("second"));
    assert!(lab.weights("first") == lab.weights("second"), "the weights differ");
}

#[test]
fn training_under_mpirun_and_without_shared_memory_gives_the_same_losses() {
    let lab = Lab::new();
    lab.train(2, "spawn", &[]).run().assert_success();
    let reference = lab.train_losses("spawn");
    for launcher in Launcher::available() {
        let output = format!("{launcher:?}");
        lab.train(2, &output, &[]).launcher(launcher).run().assert_success();
        assert_eq!(lab.train_losses(&output), reference, "{launcher:?}");
    }
    lab.train(2, "tcp", &[]).var("HVD_SHM", 0).run().assert_success();
    assert_close(&lab.train_losses("tcp"), &reference, 1e-4, "tcp");
}

/// Kills a rank of a training at a random moment, and checks the end of the others.
fn kill_somewhere(job: Job, random: &mut ChaCha8Rng, ranks: usize, longest: Duration) {
    let running = job.start();
    std::thread::sleep(longest.mul_f64(random.random::<f64>()));
    let victim = random.random_range(0..ranks);
    running.kill(victim);
    let killed = std::time::Instant::now();
    let finished = running.wait();
    let survived = finished.statuses.iter().all(|status| status.success());
    assert!(survived || killed.elapsed() < Duration::from_secs(10), "it took {:?}", killed.elapsed());
    // The others may end well only if all work was done and the ranks had said goodbye to each other.
    let others_failed = finished.statuses.iter().all(|status| !status.success());
    let was_done = [&finished.stdout, &finished.stderr].iter().any(|text| text.contains("done: "));
    assert!(others_failed || was_done, "{:?}\n{}", finished.statuses, finished.stderr);
}

#[test]
fn a_killed_training_resumes_and_ends_bit_identical() {
    let lab = Lab::new();
    let ranks = 2;
    let undisturbed = lab.train(ranks, "undisturbed", &[]).run();
    undisturbed.assert_success();
    let mut random = ChaCha8Rng::seed_from_u64(seed());
    for _ in 0..10 {
        let job = lab.train(ranks, "disturbed", &[]).args(["--resume", "auto"]);
        // Not so late that the first of them would come through to the end.
        kill_somewhere(job, &mut random, ranks, undisturbed.elapsed.mul_f64(0.7));
    }
    lab.train(ranks, "disturbed", &[]).args(["--resume", "auto"]).run().assert_success();
    assert_eq!(lab.metrics("disturbed"), lab.metrics("undisturbed"));
    assert!(lab.weights("disturbed") == lab.weights("undisturbed"), "the weights differ");
    assert_no_leftovers(&lab.run_folder("disturbed"));
}

#[test]
fn a_sharded_optimizer_gives_the_same_bits_also_after_a_kill() {
    let lab = Lab::new();
    let whole = lab.train(3, "whole", &["distributed.shard_optimizer=false"]).run();
    whole.assert_success();
    let sharded = ["distributed.shard_optimizer=true"];
    lab.train(3, "sharded", &sharded).run().assert_success();
    let mut random = ChaCha8Rng::seed_from_u64(seed());
    kill_somewhere(lab.train(3, "killed", &sharded), &mut random, 3, whole.elapsed);
    lab.train(3, "killed", &sharded).args(["--resume", "auto"]).run().assert_success();
    for output in ["sharded", "killed"] {
        assert_eq!(lab.metrics(output), lab.metrics("whole"), "{output}");
        assert!(lab.weights(output) == lab.weights("whole"), "{output}: the weights differ");
        assert!(lab.moments(output) == lab.moments("whole"), "{output}: the optimizer's state differs");
    }
}

/// What `lm evaluate --json` says, on some ranks.
fn evaluate(lab: &Lab, checkpoint: &Path, ranks: usize, launcher: Launcher) -> serde_json::Value {
    let args = ["evaluate".into(), "--json".into(), "--checkpoint".into(), checkpoint.as_os_str().to_owned()];
    let args = args.into_iter().chain(["--data".into(), lab.path("data").into_os_string()]);
    let finished = Job::new(binary("lm"), ranks).args(args).launcher(launcher).run();
    finished.assert_success();
    let line = finished.stdout.lines().find_map(|line| Some(&line[line.find('{')?..]));
    serde_json::from_str(line.expect("an object")).expect("valid JSON")
}

fn loss(figures: &serde_json::Value) -> f64 {
    figures["loss"].as_f64().expect("a loss")
}

#[test]
fn evaluation_gives_the_same_figures_on_any_number_of_ranks() {
    let lab = Lab::new();
    lab.train(2, "run", &[]).run().assert_success();
    let checkpoint = lab.run_folder("run").join("final_model");
    let alone = evaluate(&lab, &checkpoint, 1, Launcher::Spawn);
    let validated = lab.metrics("run").into_iter().rfind(|row| row.phase == "val").expect("a validation");
    let jobs = [1, 2, 3, 5].map(|ranks| (ranks, Launcher::Spawn)).into_iter();
    for (ranks, launcher) in jobs.chain(Launcher::available().into_iter().map(|launcher| (2, launcher))) {
        let figures = evaluate(&lab, &checkpoint, ranks, launcher);
        for key in ["tokens", "bytes", "accuracy"] {
            assert_eq!(figures[key], alone[key], "{key}, {ranks} ranks, {launcher:?}");
        }
        assert!((loss(&figures) - loss(&alone)).abs() < 1e-6, "{ranks} ranks, {launcher:?}: {figures} {alone}");
    }
    assert!((loss(&alone) - validated.loss.parse::<f64>().expect("a loss")).abs() < 1e-6, "{validated:?} {alone}");
}

#[test]
fn a_checkpoint_of_each_kind_can_be_evaluated_and_speaks() {
    let lab = Lab::new();
    // Two epochs, so that there is a checkpoint of each kind; the last one is also the best.
    lab.train(1, "run", &["training.max_steps=null", "training.epochs=2", "training.eval_interval=0"])
        .run()
        .assert_success();
    let run = lab.run_folder("run");
    let (hf, imported, stripped) = (lab.path("hf"), lab.path("imported"), lab.path("stripped"));
    for (command, from, input, output) in [("export", "--checkpoint", &run, &hf), ("import", "--input", &hf, &imported)]
    {
        let args = [command.as_ref(), from.as_ref(), input.as_os_str(), "--output".as_ref(), output.as_os_str()];
        Job::new(binary("lm"), 1).args(args).run().assert_success();
    }
    std::fs::create_dir(&stripped).expect("a folder");
    for name in ["config.yaml", "model.safetensors", "state.json", "tokenizer.json"] {
        std::fs::copy(run.join("final_model").join(name), stripped.join(name)).expect("a copy");
    }
    let speak = |checkpoint: &Path| {
        let args = ["--greedy".into(), "--prompt".into(), "king ".into(), "--checkpoint".into(), checkpoint.into()];
        let finished = Job::new(binary("generate"), 1).args::<std::ffi::OsString>(args).run();
        finished.assert_success();
        finished.stdout
    };
    let reference = (evaluate(&lab, &run.join("final_model"), 1, Launcher::Spawn), speak(&run.join("final_model")));
    assert!(reference.1.starts_with("king ") && reference.1.len() > 50, "{}", reference.1);
    let same =
        [lab.path("run"), run.clone(), run.join("best_model"), run.join("checkpoint_epoch2"), imported, stripped];
    for checkpoint in &same {
        let figures = evaluate(&lab, checkpoint, 1, Launcher::Spawn);
        assert_eq!(speak(checkpoint), reference.1, "{}", checkpoint.display());
        // What is imported knows nothing of the batches that it was trained in, which sums are rounded in.
        assert!((loss(&figures) - loss(&reference.0)).abs() < 1e-6, "{}: {figures}", checkpoint.display());
    }
    let step = std::fs::read_dir(&run).expect("the run's folder").flatten().map(|entry| entry.path());
    let step = step.filter(|path| path.to_string_lossy().contains("_step")).max().expect("a checkpoint of a step");
    for earlier in [run.join("checkpoint_epoch1"), step] {
        let figures = evaluate(&lab, &earlier, 1, Launcher::Spawn);
        assert!(loss(&figures) > loss(&reference.0), "{}: {figures}", earlier.display());
        assert!(speak(&earlier).starts_with("king "));
    }
}

/// Half-written checkpoints must be gone once a run has ended.
fn assert_no_leftovers(run: &Path) {
    let mut folders = vec![run.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            assert!(!name.contains("tmp"), "left behind: {name}");
            if entry.path().is_dir() {
                folders.push(entry.path());
            }
        }
    }
}

#[test]
fn a_missing_checkpoint_is_an_error_on_all_ranks() {
    let lab = Lab::new();
    let finished = lab.train(2, "missing", &[]).args(["--resume", "no/such/checkpoint"]).run();
    finished.assert_failure();
    assert!(finished.stderr.contains("no/such/checkpoint"), "{}", finished.stderr);
}

#[test]
fn a_run_that_is_being_written_is_refused_on_all_ranks() {
    let lab = Lab::new();
    lab.train(2, "runs", &["training.max_steps=2"]).run().assert_success();
    let folder = lab.run_folder("runs");
    let held = std::fs::File::open(folder.join("run.lock")).expect("a file to lock");
    held.try_lock().expect("the lock of a training that has ended");
    let again = || lab.train(2, "runs", &["training.max_steps=4"]).args(["--resume", "auto"]).run();
    let finished = again();
    finished.assert_failure();
    for complaint in &finished.complaints {
        assert!(
            complaint.contains("another training") && complaint.contains(folder.to_str().expect("text")),
            "{complaint}"
        );
    }
    drop(held);
    again().assert_success();
}

#[test]
fn a_wrong_setting_ends_all_ranks_with_one_explanation() {
    let lab = Lab::new();
    let finished = lab.train(2, "wrong", &["training.learning_rat=1"]).run();
    finished.assert_failure();
    assert!(finished.stderr.contains("learning_rate"), "{}", finished.stderr);
}

/// A slice of a trace, of one of the program's own rows.
struct Slice {
    name: String,
    start: f64,
    end: f64,
}

/// The slices of the row `training` of a rank.
fn slices(events: &[serde_json::Value], rank: usize) -> Vec<Slice> {
    let of_rank = || events.iter().filter(|event| event["pid"] == rank);
    let row = of_rank().find(|event| event["name"] == "thread_name" && event["args"]["name"] == "training");
    let row = &row.expect("a row for training")["tid"];
    let own = of_rank().filter(|event| event["ph"] == "X" && event["tid"] == *row);
    let slice = |event: &serde_json::Value| {
        let (start, length) = (event["ts"].as_f64().expect("a time"), event["dur"].as_f64().expect("a duration"));
        Slice { name: event["name"].as_str().expect("a name").into(), start, end: start + length }
    };
    own.map(slice).collect()
}

#[test]
fn a_profile_shows_what_each_update_does_on_every_rank() {
    let lab = Lab::new();
    let path = lab.path("trace.json");
    std::fs::write(&path, "of an earlier run").expect("a file");
    let sets = ["training.max_steps=5", "training.save_interval=0", "training.per_gpu_batch_size=6"];
    lab.train(2, "runs", &sets).args(["--profile".into(), path.clone()]).run().assert_success();

    let text = std::fs::read_to_string(&path).expect("the trace");
    let events: Vec<serde_json::Value> = serde_json::from_str(&text).expect("an array of events");
    for rank in [0, 1] {
        let slices = slices(&events, rank);
        let updates: Vec<&Slice> = slices.iter().filter(|slice| slice.name == "update").collect();
        assert_eq!(updates.len(), 5);
        for update in updates {
            let within = |name: &str| {
                let parts = slices.iter().filter(|part| part.name == name);
                parts.filter(|part| update.start <= part.start && part.end <= update.end + 1.0).count()
            };
            // 12 sequences a rank in micro-batches of 6.
            let parts = ["data", "forward", "backward", "wait for communication", "optimizer"];
            assert_eq!(parts.map(within), [1, 2, 2, 1, 1], "rank {rank}");
        }
        let reductions = events.iter().filter(|event| event["pid"] == rank && event["name"] == "ALLREDUCE").count();
        assert!(reductions >= 5, "rank {rank} shows {reductions} reductions");
    }
}
