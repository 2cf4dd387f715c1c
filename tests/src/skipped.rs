//! What a test leaves out. Other crates' tests take this file in by its path.

use std::io::Write;

/// Says that the running test leaves something out, and why. Straight to stderr, as `cargo test` keeps to itself what a test that
/// passes prints; `scripts/test.sh` repeats it at its end.
pub fn skipped(reason: &str) {
    let test = std::thread::current();
    let line = format!("skipped: {}: {reason}\n", test.name().unwrap_or("a thread of a test"));
    std::io::stderr().write_all(line.as_bytes()).expect("stderr");
}
