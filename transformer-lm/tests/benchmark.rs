//! `train --benchmark` on the built binary.

use std::process::{Command, Output};

use serde_json::Value;

fn benchmark(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_train")).args(args).output().unwrap()
}

#[test]
fn it_prints_what_pytorchs_program_prints() {
    let output =
        benchmark(&["--benchmark", "--preset", "tiny", "--threads", "1", "--steps", "2", "--warmup", "1", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (key, expected) in
        [("preset", Value::from("tiny")), ("dtype", "float32".into()), ("products", "float32".into())]
    {
        assert_eq!(found[key], expected, "{found}");
    }
    for (key, expected) in [("ranks", 1.0), ("threads", 1.0), ("batch", 12.0)] {
        assert_eq!(found[key].as_f64(), Some(expected), "{found}");
    }
    let number = |key: &str| found[key].as_f64().unwrap();
    assert!((number("tokens_per_s") * number("step_ms") / (768.0 * 1e3) - 1.0).abs() < 1e-6, "{found}");
    // Random tokens, of which 256 are equally likely: ln 256, and little is learnt in 3 updates.
    assert!((number("loss") - 256f64.ln()).abs() < 0.1, "{found}");
}

#[test]
fn its_flags_belong_together() {
    for args in [
        &["--preset", "tiny"][..],
        &["--benchmark", "--config", "x.yaml"],
        &["--benchmark", "--steps", "0"],
        &["--benchmark", "--preset", "huge"],
        &["--benchmark", "--dry-run"],
    ] {
        let output = benchmark(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
