//! Programs of `tests/pytorch`, which a Python with torch and transformers runs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names that Python; `scripts/test.sh --full` makes one.
const PYTHON: &str = "HVD_TEST_PYTHON";

/// That Python; where there is none, says that the test is skipped.
pub fn python() -> Option<PathBuf> {
    let python = std::env::var_os(PYTHON).filter(|path| !path.is_empty());
    if python.is_none() {
        eprintln!("skipped: {PYTHON} names no Python with torch and transformers; scripts/test.sh --full makes one");
    }
    python.map(PathBuf::from)
}

/// Runs a program.
///
/// # Panics
/// With its output, unless it ends well.
pub fn run<T: AsRef<OsStr>>(python: &Path, program: &str, args: &[T]) {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/pytorch").join(program);
    let mut command = Command::new(python);
    command
        .arg(&program)
        .args(args)
        .env("OMP_NUM_THREADS", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let output = command.output().unwrap_or_else(|error| panic!("{}: {error}", python.display()));
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{}: {}\n{out}\n{err}", program.display(), output.status);
}
