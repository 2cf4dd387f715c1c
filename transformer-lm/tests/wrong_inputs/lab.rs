//! A folder as a user has it, damaged anew for each case.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use tempfile::TempDir;

/// The run's folder in a lab.
pub const RUN: &str = "runs/20260101_000000_run";

/// A run that does not end by itself is ended after so many seconds.
const LIMIT_SECONDS: &str = "120";

/// Four updates of a tiny model.
const CONFIG: &str = "\
model: {d_model: 16, n_heads: 2, n_layers: 2, d_ff: 32, dropout: 0.0, max_seq_len: 8, vocab_size: auto}
training: {max_steps: 4, per_gpu_batch_size: 4, learning_rate: 0.003, warmup_steps: 2, log_interval: 1, save_interval: 2,
  eval_interval: 4, amp_dtype: fp32, device: cpu, peak_tflops: 0.1, sample_tokens: 4}
data: {data_dir: data, num_workers: 0}
";

/// Does something bad to the files in a folder.
pub type Damage = fn(&Path);

/// What lies where: the bytes of files, none for everything else.
type Tree = BTreeMap<PathBuf, Option<Vec<u8>>>;

/// `text.txt`, `data` prepared from it by the tokenizer `byte`, `chars` by `char`, `config.yaml` and a finished run.
pub struct Lab {
    good: &'static Tree,
    failures: Vec<String>,
    count: usize,
}

impl Lab {
    pub fn new() -> Self {
        static GOOD: OnceLock<Tree> = OnceLock::new();
        Lab { good: GOOD.get_or_init(Lab::make), failures: Vec::new(), count: 0 }
    }

    fn make() -> Tree {
        let folder = tempfile::tempdir().unwrap();
        let words = ["king", "queen", "speaks", "to", "the", "crown", "sword", "of", "night"];
        let text: Vec<&str> = (0..1500).map(|i: usize| words[i * i % 31 % words.len()]).collect();
        fs::write(folder.path().join("text.txt"), text.join(" ")).unwrap();
        fs::write(folder.path().join("config.yaml"), CONFIG).unwrap();
        for line in [
            "lm prepare --input text.txt --output data",
            "lm prepare --input text.txt --output chars --tokenizer char",
            "train --config config.yaml --run_name run",
        ] {
            let output = run(folder.path(), line);
            assert!(output.status.success(), "{line}: {output:?}");
        }
        let runs = folder.path().join("runs");
        let made = fs::read_dir(&runs).unwrap().next().unwrap().unwrap().path();
        fs::rename(made, folder.path().join(RUN)).unwrap();
        tree(folder.path())
    }

    /// A folder of its own with all that is in the lab.
    pub fn folder(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, content) in self.good {
            let path = folder.path().join(path);
            match content {
                None => fs::create_dir(path).unwrap(),
                Some(bytes) => fs::write(path, bytes).unwrap(),
            }
        }
        folder
    }

    /// Runs the command line `line` in a good folder.
    pub fn refuses(&mut self, line: &str, code: i32, message: &str) {
        self.refuses_damaged(line, |_| {}, line, code, message);
    }

    /// Runs `line` in a folder after `damage`. It has to end with `code` and say `message`, and to leave all as it was.
    pub fn refuses_damaged(&mut self, name: &str, damage: impl Fn(&Path), line: &str, code: i32, message: &str) {
        let folder = self.folder();
        damage(folder.path());
        let before = tree(folder.path());
        let output = run(folder.path(), line);
        let said = String::from_utf8_lossy(&output.stderr);
        let after = tree(folder.path());
        let changed = difference(&before, &after);
        self.count += 1;
        if output.status.code() != Some(code)
            || !said.contains(message)
            || said.contains("panicked")
            || !changed.is_empty()
        {
            let status = output.status;
            self.failures.push(format!(
                "{name}\n  {status}, expected {code}\n  {said}\n  expected: {message}\n  changed: {changed:?}"
            ));
        }
    }

    /// Fails the test if a case failed, with all of them.
    pub fn finish(self) {
        let (failed, count) = (self.failures.len(), self.count);
        assert!(failed == 0, "{failed} of {count} cases:\n{}", self.failures.join("\n"));
    }
}

/// Runs a command line of one of our binaries in `folder`. Words are parted by spaces; `''` is an empty one.
pub fn run(folder: &Path, line: &str) -> Output {
    command(folder, line).output().unwrap()
}

/// The same, to be run.
pub fn command(folder: &Path, line: &str) -> Command {
    let mut words = line.split(' ').map(|word| if word == "''" { "" } else { word });
    let program = match words.next() {
        Some("train") => env!("CARGO_BIN_EXE_train"),
        Some("generate") => env!("CARGO_BIN_EXE_generate"),
        _ => env!("CARGO_BIN_EXE_lm"),
    };
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", LIMIT_SECONDS, program]).args(words).current_dir(folder);
    command.env("OMP_NUM_THREADS", "1").env("RUST_BACKTRACE", "0").stdin(std::process::Stdio::null());
    command
}

/// Replaces what `path` holds by what `change` makes of it.
pub fn rewrite(path: impl AsRef<Path>, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let path = path.as_ref();
    fs::write(path, change(fs::read(path).unwrap())).unwrap();
}

fn tree(folder: &Path) -> Tree {
    fn walk(root: &Path, folder: &Path, tree: &mut Tree) {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let content = entry.file_type().unwrap().is_file().then(|| fs::read(&path).unwrap());
            tree.insert(path.strip_prefix(root).unwrap().to_path_buf(), content);
            if entry.file_type().unwrap().is_dir() {
                walk(root, &path, tree);
            }
        }
    }
    let mut all = Tree::new();
    walk(folder, folder, &mut all);
    all
}

/// The paths that are in one only, or differ.
fn difference<'a>(before: &'a Tree, after: &'a Tree) -> Vec<&'a Path> {
    let paths = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
    paths.filter(|path| before.get(*path) != after.get(*path)).map(PathBuf::as_path).collect()
}
