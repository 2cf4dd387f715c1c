//! Standard output that nobody reads, or that is full.

use std::fs::File;
use std::process::{Output, Stdio};

use super::lab::{Lab, RUN, command, run};

/// A line of every command that prints what it found or made.
const LINES: [&str; 11] = [
    "train --config config.yaml --dry-run",
    "train --config config.yaml --print-config",
    "train --benchmark --preset tiny --threads 1 --batch 1 --steps 1 --warmup 0",
    "lm evaluate --checkpoint RUN",
    "lm prepare --input text.txt --output new",
    "lm prepare --verify --output data",
    "lm report RUN",
    "lm export --checkpoint RUN --output new",
    "lm import --input exported --output new",
    "generate --checkpoint RUN --max_new_tokens 2",
    "lm generate --checkpoint RUN --max_new_tokens 2 --json",
];

/// What each line gives with such an output, each in a folder of its own.
fn outputs(stdout: impl Fn() -> Stdio) -> impl Iterator<Item = (&'static str, Output)> {
    LINES.into_iter().map(move |line| {
        let folder = Lab::new().folder();
        if line.contains("exported") {
            let made = run(folder.path(), &format!("lm export --checkpoint {RUN} --output exported"));
            assert!(made.status.success(), "{made:?}");
        }
        let child = command(folder.path(), &line.replace("RUN", RUN)).stdout(stdout()).stderr(Stdio::piped()).spawn();
        (line, child.unwrap().wait_with_output().unwrap())
    })
}

#[test]
fn a_reader_that_is_gone_is_no_failure() {
    for (line, output) in outputs(|| std::io::pipe().unwrap().1.into()) {
        assert!(output.status.success() && output.stderr.is_empty(), "{line}: {output:?}");
    }
}

#[test]
fn a_full_disk_is_one_with_a_message() {
    for (line, output) in outputs(|| File::create("/dev/full").unwrap().into()) {
        let said = String::from_utf8_lossy(&output.stderr);
        let expected = "error: cannot write standard output: No space left on device";
        assert!(output.status.code() == Some(1) && said.starts_with(expected), "{line}: {output:?}");
    }
}
