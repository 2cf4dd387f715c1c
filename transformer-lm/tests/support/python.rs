//! Programs of `tests/pytorch`, which a Python with torch and transformers runs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::skipped::skipped;

/// Names that Python; `scripts/test.sh --full` makes one.
const PYTHON: &str = "HVD_TEST_PYTHON";

/// Set where nothing may be skipped for want of that Python: by `scripts/test.sh --full`.
const FULL: &str = "HVD_TEST_FULL";

/// That Python; where there is none, says that the test is skipped.
///
/// # Panics
/// Where there is none in a full run.
pub fn python() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let python = set(PYTHON).map(PathBuf::from);
    if python.is_none() {
        let reason = format!("{PYTHON} names no Python with torch and transformers; scripts/test.sh --full makes one");
        assert!(set(FULL).is_none(), "{reason}");
        skipped(&reason);
    }
    python
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
