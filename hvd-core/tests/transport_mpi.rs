//! The transport over MPI, with the ranks that `mpirun` starts: this test runs itself under it.

mod support;

use std::process::{Command, Output};
use std::time::Duration;

use hvd_core::transport::Transport;
use hvd_core::transport::mpi::MpiTransport;
use hvd_core::transport::tcp::{Identity, Meeting, TcpOptions, TcpTransport};
use hvd_core::{Error, Memory};
use support::*;

/// Says what a rank shall do; the tests set it for `mpirun`.
const ROLE: &str = "HVD_TEST_ROLE";

/// Builds the plugin beside this test.
fn build_plugin() {
    let profile: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
    let built =
        Command::new(env!("CARGO")).args(["build", "-p", "hvd-mpi"]).args(profile).output().expect("cargo runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// Runs `as_a_rank` of this test on `size` ranks.
fn mpirun(size: usize, role: &str) -> Output {
    build_plugin();
    let mpirun = std::env::var("HVD_TEST_MPIRUN").unwrap_or_else(|_| "mpirun".into());
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "60", &mpirun, "-np", &size.to_string()]);
    command.arg(std::env::current_exe().expect("our own path"));
    command.args(["--exact", "as_a_rank", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env("HVD_JOB_ID", fresh_job()).env_remove("RUST_BACKTRACE");
    for (name, value) in [
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
    ] {
        command.env(name, value);
    }
    command.output().expect("mpirun runs")
}

fn everything(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn ranks_exchange_messages() {
    for size in [1, 2, 5] {
        let output = mpirun(size, "exchange");
        let text = everything(&output);
        assert!(output.status.success(), "{size} ranks: {text}");
        assert_eq!(text.matches("exchanged").count(), size, "{text}");
    }
}

#[test]
fn the_ranks_can_meet_through_mpi() {
    let output = mpirun(3, "meet-through-mpi");
    assert!(output.status.success(), "{}", everything(&output));
}

#[test]
fn a_lost_rank_ends_the_job() {
    for role in ["die", "panic"] {
        let output = mpirun(3, role);
        let text = everything(&output);
        assert!(!output.status.success() && output.status.code() != Some(124), "{role}: {text}");
        // The launcher may be faster than the words of the others, but not than those of a rank that can still speak.
        let words = if role == "panic" { "as told" } else { "" };
        assert!(text.contains(words), "{role}: {text}");
    }
}

#[test]
#[ignore = "a rank of the other tests"]
fn as_a_rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let identity = identity_of_launcher();
    let options = TcpOptions::default();
    let rank = match role.as_str() {
        "meet-through-mpi" => MpiTransport::load(identity, &options),
        _ => {
            let meeting = Meeting::Unix { job: std::env::var("HVD_JOB_ID").expect("set for all ranks") };
            TcpTransport::connect(identity, &meeting, &options).and_then(MpiTransport::beside)
        }
    };
    let mut rank = rank.expect("joining");
    match (role.as_str(), identity.rank) {
        ("die", 1) => std::process::abort(),
        ("panic", 1) => panic!("as told"),
        ("die" | "panic", _) => {
            let error = failure(&mut rank);
            assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error}");
            // In one write, so that the lines of ranks do not mix.
            eprint!("{}", format_args!("rank {}: {error}\n", identity.rank));
            std::thread::sleep(Duration::from_millis(100)); // Let mpirun forward the line.
            std::process::exit(1);
        }
        _ => exchange(rank),
    }
}

fn identity_of_launcher() -> Identity {
    let number = |names: [&str; 2]| {
        let value = names.iter().find_map(|name| std::env::var(name).ok()).expect("started by mpirun");
        value.parse().expect("a number")
    };
    let rank = number(["OMPI_COMM_WORLD_RANK", "PMI_RANK"]);
    let size = number(["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]);
    Identity { rank, size, generation: 0 }
}

/// Messages of all lengths between all pairs, some before their receives and some after.
fn exchange(mut rank: MpiTransport) {
    let (me, size) = (rank.rank(), rank.size());
    let lengths = [0, 1, 1024, 1025, 100_000, 4 << 20];
    let mut requests = Vec::new();
    let mut received = Vec::new();
    for _ in 0..3 {
        for peer in 0..size {
            for (index, length) in lengths.into_iter().enumerate() {
                let data = memory(&vec![(me * 7 + index) as u8; length]);
                requests.push(rank.send(peer, tag(index as u32), data).expect("send"));
            }
        }
        for peer in 0..size {
            for (index, length) in lengths.into_iter().enumerate() {
                let into = Memory::zeroed(length);
                requests.push(rank.recv(peer, tag(index as u32), into.clone()).expect("recv"));
                received.push(((peer * 7 + index) as u8, into));
            }
        }
    }
    wait_all(&mut rank, requests).expect("waiting");
    for (fill, into) in received {
        assert!(bytes(&into).iter().all(|byte| *byte == fill));
    }
    let next = (me + 1) % size;
    let long = rank.send(next, tag(99), memory(&vec![3; 50_000])).expect("send");
    assert_eq!(receive_any(&mut rank, (me + size - 1) % size, tag(99)).expect("any"), vec![3; 50_000]);
    wait(&mut rank, long).expect("waiting");
    close(Box::new(rank));
    println!("exchanged");
}
