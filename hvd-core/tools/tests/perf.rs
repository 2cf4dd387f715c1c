//! `hvd-perf` as a user runs it: several processes, their output and exit codes.

use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// Runs all ranks of `hvd-perf`; gives each one's output.
fn ranks(size: usize, job: &str, args: &[&str]) -> Vec<Output> {
    let start = |rank: usize| -> Child {
        Command::new(env!("CARGO_BIN_EXE_hvd-perf"))
            .args(args)
            .env("HVD_RANK", rank.to_string())
            .env("HVD_SIZE", size.to_string())
            .env("HVD_JOB_ID", format!("perf-{job}-{}", std::process::id()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..size).map(start).collect();
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

/// The rows that rank 0 printed; all ranks must have ended well and the others kept silent.
fn rows(size: usize, job: &str, args: &[&str]) -> Vec<Value> {
    let outputs = ranks(size, job, &[args, &["--json"]].concat());
    for (rank, output) in outputs.iter().enumerate() {
        assert!(output.status.success(), "rank {rank}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(rank == 0 || output.stdout.is_empty(), "rank {rank} printed something");
    }
    let text = String::from_utf8(outputs[0].stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A few only.
fn tensors(bench: &str) -> &'static [&'static str] {
    if bench == "fusion" { &["--tensors", "5"] } else { &[] }
}

#[test]
fn every_bench_is_right_on_several_ranks() {
    let benches = ["allreduce", "allgather", "broadcast", "reducescatter", "alltoall", "fusion"];
    for (bench, size) in benches.into_iter().zip([2, 3, 2, 3, 3, 3]) {
        let args = [bench, "-b", "4K", "-e", "64K", "--iters", "2", "--warmup", "1", "--check"];
        let args = [&args[..], tensors(bench)].concat();
        for backend in ["shm", "tcp"] {
            let rows = rows(size, &format!("{bench}-{backend}"), &[&args[..], &["--backend", backend]].concat());
            assert_eq!(rows.len(), 3, "{bench}");
            for row in rows {
                assert_eq!(row["errors"], 0, "{row}");
                assert_eq!(row["backend"], backend);
                assert_eq!(row["ranks"], size);
                assert_eq!(row["buffer"], "private");
                assert!(row["median_us"].as_f64() >= row["min_us"].as_f64(), "{row}");
            }
        }
    }
}

#[test]
fn shared_buffers_are_reduced_in_place() {
    for bench in ["allreduce", "fusion"] {
        let args = [bench, "-b", "4K", "-e", "64K", "--iters", "2", "--check", "--buffer", "shared"];
        for row in rows(2, &format!("{bench}-shared"), &[&args[..], tensors(bench)].concat()) {
            assert_eq!((&row["errors"], &row["buffer"]), (&0.into(), &"shared".into()), "{row}");
        }
    }
}

#[test]
fn every_type_and_operation_is_right() {
    for dtype in ["f16", "bf16", "f32", "f64", "i8", "i16", "i32", "i64", "u8"] {
        for op in ["sum", "average", "min", "max", "product", "adasum"] {
            let small = ["i8", "i16", "u8"].contains(&dtype);
            if small && ["average", "product"].contains(&op) || op == "adasum" && !dtype.contains('f') {
                continue;
            }
            let args = ["allreduce", "-b", "1000", "-e", "1000", "--iters", "1", "--warmup", "0", "--check"];
            let args = [&args[..], &["--dtype", dtype, "--op", op]].concat();
            assert_eq!(rows(2, &format!("{dtype}-{op}"), &args)[0]["errors"], 0, "{dtype} {op}");
        }
    }
}

#[test]
fn bus_bandwidth_follows_from_size_and_time() {
    let rows = rows(2, "busbw", &["allreduce", "-b", "1M", "-e", "1M", "--iters", "3"]);
    let number = |key: &str| rows[0][key].as_f64().unwrap();
    let expected = number("bytes") / number("median_us") / 1e3;
    assert!((number("busbw_gbps") - expected).abs() <= 0.01 * expected + 0.001, "{}", rows[0]);
}

#[test]
fn alone_it_prints_a_table() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_hvd-perf")).args(["fusion", "--compression", "fp16"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("# fusion: ranks 1, backend solo, buffer private, compression fp16\n")
            && text.contains("12800KiB"),
        "{text}"
    );
}

#[test]
fn wrong_arguments_end_with_what_to_do() {
    for (args, says) in [
        (vec!["allreduce", "-b", "4T"], "expected a number of bytes"),
        (vec!["allreduce", "-f", "1"], "--factor"),
        (vec!["allreduce", "--dtype", "u8", "--op", "product"], "not defined for"),
        (vec!["allgather", "--compression", "fp16"], "only allreduce, reducescatter and fusion combine elements"),
        (vec!["nonsense"], "allgather"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_hvd-perf")).args(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(says), "{args:?}: {text}");
    }
}

#[test]
fn another_backend_than_asked_for_is_refused() {
    let outputs = Command::new(env!("CARGO_BIN_EXE_hvdrun"))
        .args(["-np", "2", env!("CARGO_BIN_EXE_hvd-perf"), "allreduce", "--backend", "mpi", "-e", "4K"])
        .env("HVD_MPI_PLUGIN", "missing.so")
        .output()
        .unwrap();
    assert_eq!(outputs.status.code(), Some(1));
    assert!(String::from_utf8(outputs.stderr).unwrap().contains("missing.so"));
}
