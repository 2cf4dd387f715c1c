//! `hvdrun` as its users see it: places, output, input, signals, failures, secrets, other hosts.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hvd_tests::{Finished, Job, Launcher, Running, binary};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// From the end of what kept a process alive to its own.
const LIMIT: Duration = Duration::from_secs(20);

/// `ranks` shells that run `script` under hvdrun.
fn shells(ranks: usize, script: &str) -> Job {
    Job::new("sh", ranks).launcher(Launcher::Hvdrun).args(["-c", script])
}

fn worker(ranks: usize, args: &[&str]) -> Job {
    Job::new(binary("hvd-worker"), ranks).launcher(Launcher::Hvdrun).args(args.iter().copied())
}

fn code(finished: &Finished) -> Option<i32> {
    finished.statuses[0].code()
}

#[track_caller]
fn assert_code(finished: &Finished, expected: i32) {
    assert_eq!(code(finished), Some(expected), "{}\n--- stderr\n{}", finished.stdout, finished.stderr);
}

#[track_caller]
fn assert_says(finished: &Finished, texts: &[&str]) {
    for text in texts {
        assert!(finished.stderr.contains(text), "`{text}` is missing in\n{}", finished.stderr);
    }
}

/// What the ranks printed after `marker`, a word each.
fn words_after(text: &str, marker: &str) -> Vec<String> {
    let word = |rest: &str| rest.split_whitespace().next().unwrap_or("").to_string();
    text.split(marker).skip(1).map(word).collect()
}

fn processes_after(text: &str, marker: &str) -> Vec<Pid> {
    words_after(text, marker).iter().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// Whether a process runs; one that only waits to be reaped by whoever adopted it does not.
fn runs(process: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(process).is_ok() && !stat.contains(") Z ")
}

#[track_caller]
fn assert_ended(processes: &[Pid]) {
    let start = Instant::now();
    while processes.iter().any(|&process| runs(process)) {
        assert!(start.elapsed() < LIMIT, "processes are still there after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_rank_has_its_place_and_every_line_its_rank() {
    let finished =
        shells(3, r#"echo "I am $HVD_RANK of $HVD_SIZE, $HVD_LOCAL_RANK here"; echo "oh $HVD_RANK" >&2"#).run();
    finished.assert_success();
    for rank in 0..3 {
        let line = format!("[{rank}]<stdout>: I am {rank} of 3, {rank} here\n");
        assert!(finished.stdout.contains(&line), "{}", finished.stdout);
        assert_says(&finished, &[&format!("[{rank}]<stderr>: oh {rank}\n")]);
    }
}

#[test]
fn lines_can_be_plain_or_timed_and_a_question_without_an_end_is_shown() {
    let plain = shells(1, "echo plain").launcher_args(["--no-tag-output"]).run();
    assert_eq!(plain.assert_success().stdout, "plain\n");
    let timed = shells(1, "echo timed").launcher_args(["--prefix-output-with-timestamp"]).run();
    let (time, line) = timed.assert_success().stdout.split_at(24);
    assert!(time.starts_with("20") && time.contains(':') && line == "[0]<stdout>: timed\n", "{}", timed.stdout);
    let mut asking = shells(1, "printf 'your name? '; exec sleep 1000").start();
    assert!(asking.wait_for("[0]<stdout>: your name? "), "it ended");
}

#[test]
fn output_goes_to_files_as_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("new/out");
    let job = shells(11, r#"echo "out $HVD_RANK"; printf "err $HVD_RANK" >&2"#);
    job.launcher_args(["--output-filename".into(), out.clone()]).run().assert_success();
    let read = |name: &str| std::fs::read_to_string(out.join(name)).expect(name);
    assert_eq!((read("rank.03/stdout"), read("rank.10/stderr")), ("out 3\n".into(), "err 10".into()));
}

#[test]
fn rank_0_reads_our_input_whole_and_the_others_none() {
    let mut file = tempfile::tempfile().expect("a file");
    let text: String = (0..200_000).map(|line| format!("line {line}\n")).collect();
    file.write_all(text.as_bytes()).expect("a written file");
    std::io::Seek::rewind(&mut file).expect("a file at its start");
    let finished = shells(2, "cat").launcher_args(["--no-tag-output"]).stdin(file).run();
    assert!(finished.assert_success().stdout == text, "{} of {} bytes", finished.stdout.len(), text.len());
}

#[test]
fn a_rank_that_reads_nothing_ends_all_the_same() {
    let zeros = File::open("/dev/zero").expect("zeros without end");
    shells(2, "exit 0").stdin(zeros).run().assert_success();
}

#[test]
fn the_first_rank_that_fails_is_named_with_its_code_and_last_words() {
    let script = "trap 'echo asked to end; exit 3' TERM
        if [ $HVD_RANK = 1 ]; then echo 'the disk is full' >&2; exit 7; fi
        sleep 1000 & wait";
    let finished = shells(3, script).run();
    assert_code(&finished, 7);
    assert_says(&finished, &["rank 1 on localhost failed first: exit code 7", "    the disk is full"]);
    assert_says(&finished, &["then ranks 0, 2: exit code 3"]);
    assert_eq!(finished.stdout.matches("asked to end").count(), 2, "{}", finished.stdout);
}

#[test]
fn the_rank_that_was_killed_is_named_and_not_those_that_lost_it() {
    let mut running = worker(3, &["steps", "--count", "1000000000", "--elements", "1000"]).start();
    assert!(running.wait_for("stepping"), "the job ended by itself");
    let victim = processes_after(&running.stdout(), "rank 2 is process ")[0];
    kill_process(victim, Signal::KILL).expect("a process to kill");
    let finished = running.wait();
    assert_code(&finished, 137);
    assert_says(&finished, &["rank 2 on localhost failed first: killed by SIGKILL (9)", "then ranks 0-1: exit code 1"]);
}

#[test]
fn the_cause_is_named_behind_backtraces_too() {
    for _ in 0..5 {
        let log = "/dev/null/none/tuner.csv"; // which rank 0 writes
        let job = worker(3, &["steps", "--count", "1000", "--elements", "1000"]).var("RUST_BACKTRACE", 1);
        let finished = job.var("HVD_AUTOTUNE", 1).var("HVD_AUTOTUNE_LOG", log).run();
        assert_says(&finished, &["rank 0 on localhost failed first: exit code 1", log]);
    }
}

#[test]
fn signals_reach_all_ranks_and_the_stubborn_are_killed() {
    for (signal, expected) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        if is_ignored(signal) {
            hvd_tests::skipped(&format!(
                "{signal:?} is ignored here, as in a shell's background jobs, and so by what is started"
            ));
            continue;
        }
        let script = "trap 'echo ended well; exit 0' TERM INT; echo ready; while :; do sleep 0.02; done";
        let mut running = shells(2, script).start();
        wait_for_all(&mut running, "ready", 2);
        running.signal(0, signal);
        let finished = running.wait();
        assert_code(&finished, expected);
        assert_eq!(finished.stdout.matches("ended well").count(), 2, "{}", finished.stdout);
    }
    let mut running =
        shells(2, "trap '' TERM; echo ready; while :; do sleep 0.02; done").launcher_args(["--grace", "0.2"]).start();
    wait_for_all(&mut running, "ready", 2);
    running.signal(0, Signal::TERM);
    assert_code(&running.wait(), 143);
}

/// Whether this process ignores a signal: so do its children, which shells and hvdrun leave as it is.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("this process's status");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a mask of signals");
    u64::from_str_radix(mask.trim(), 16).expect("hex digits") >> (signal.as_raw() - 1) & 1 == 1
}

#[test]
fn a_user_signal_is_passed_on_and_ends_nothing() {
    let mut running = shells(2, "trap 'echo got it; exit 0' USR1; echo ready; while :; do sleep 0.02; done").start();
    wait_for_all(&mut running, "ready", 2);
    running.signal(0, Signal::USR1);
    let finished = running.wait();
    assert_eq!(finished.assert_success().stdout.matches("got it").count(), 2, "{}", finished.stdout);
}

#[track_caller]
fn wait_for_all(running: &mut Running, text: &str, ranks: usize) {
    for rank in 0..ranks {
        assert!(running.wait_for(&format!("[{rank}]<stdout>: {text}")), "the job ended by itself");
    }
}

/// Shells with a child each; both say who they are.
const FAMILY: &str = "sleep 1000 & echo processes $$ $!; echo child $!; wait";

fn family(running: &mut Running, ranks: usize) -> Vec<Pid> {
    wait_for_all(running, "child", ranks);
    let text = running.stdout();
    [processes_after(&text, "processes "), processes_after(&text, "child ")].concat()
}

#[test]
fn nothing_outlives_a_killed_hvdrun() {
    let mut running = shells(2, FAMILY).start();
    let processes = family(&mut running, 2);
    assert_eq!(processes.len(), 4);
    running.signal(0, Signal::KILL);
    assert_ended(&processes);
}

#[test]
fn the_ranks_of_a_killed_agent_die_and_hvdrun_says_so() {
    let mut running = shells(2, "echo agent $PPID; echo process $$; exec sleep 1000").start();
    wait_for_all(&mut running, "process", 2);
    let agent = processes_after(&running.stdout(), "agent ")[0];
    let processes = processes_after(&running.stdout(), "process ");
    kill_process(agent, Signal::KILL).expect("an agent to kill");
    let finished = running.wait();
    assert_code(&finished, 125);
    assert_says(&finished, &["lost the host localhost with ranks 0-1"]);
    assert_ended(&processes);
}

#[test]
fn what_a_rank_leaves_behind_is_ended() {
    let finished = shells(1, "sleep 1000 & echo left $!").run();
    finished.assert_success();
    assert_ended(&processes_after(&finished.stdout, "left "));
}

#[test]
fn each_job_has_a_secret_that_no_command_line_shows() {
    let mut secrets = HashSet::new();
    for _ in 0..2 {
        let mut running = shells(2, "echo secret $HVD_SECRET; exec sleep 1000").start();
        wait_for_all(&mut running, "secret", 2);
        let found = words_after(&running.stdout(), "secret ");
        assert!(found[0].len() == 64 && found[0] == found[1], "{found:?}");
        let shown = std::fs::read_dir("/proc").expect("the processes").flatten().any(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&found[0])
        });
        assert!(!shown, "the secret is on a command line");
        secrets.insert(found[0].clone());
    }
    assert_eq!(secrets.len(), 2);
}

#[test]
fn settings_and_the_environment_reach_the_ranks_but_not_another_jobs_meeting_point() {
    let script = r#"echo "$MINE $HVD_CACHE_CAPACITY $HVD_FUSION_THRESHOLD [$HVD_RENDEZVOUS]""#;
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("job.yaml");
    std::fs::write(&config, "num_proc: 7\ncache_capacity: 5\nfusion_threshold_mb: 1\n").expect("a file");
    let job = shells(1, script).var("MINE", "yes").var("HVD_RENDEZVOUS", "elsewhere:1");
    let job = job.launcher_args(["--cache-capacity", "9", "--config-file", config.to_str().expect("a path")]);
    let finished = job.run();
    assert_eq!(finished.assert_success().stdout, "[0]<stdout>: yes 9 1048576 []\n");
}

#[test]
fn ranks_of_one_host_share_its_cores_unless_told_otherwise() {
    let threads = |job: Job| words_after(&job.run().assert_success().stdout, "threads=");
    let script = r#"echo "threads=$OMP_NUM_THREADS" "#;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = |ranks: usize| std::env::var("OMP_NUM_THREADS").unwrap_or_else(|_| (cores / ranks).max(1).to_string());
    for ranks in [2, 3] {
        assert_eq!(threads(shells(ranks, script)), vec![share(ranks); ranks]);
    }
    assert_eq!(threads(shells(2, script).var("OMP_NUM_THREADS", "7")), ["7", "7"]);
    let alone = std::env::var("OMP_NUM_THREADS").unwrap_or_default();
    assert_eq!(threads(shells(1, script)), [alone]);
}

#[test]
fn a_program_that_cannot_run_gives_a_shells_codes() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("text");
    std::fs::write(&file, "no program").expect("a file");
    for (program, expected, text) in [
        (PathBuf::from("no-such-program"), 127, "no-such-program"),
        ("./no/such".into(), 127, "no/such"),
        (file, 126, "text"),
    ] {
        let finished = Job::new(program, 2).launcher(Launcher::Hvdrun).run();
        assert_code(&finished, expected);
        assert_says(&finished, &[text]);
    }
}

#[test]
fn wrong_usage_is_explained() {
    for (args, text) in [
        (&["-H", "localhost:1"][..], "do not fit into the 1 slots"),
        (&["-H", "a b"], "does not name a host"),
        (&["--hostfile", "no/such/file"], "no/such/file"),
        (&["--config-file", "no/such.yaml"], "no/such.yaml"),
        (&["--grace=-1"], "grace"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--min-np", "1"], "--min-np is not supported: there is no elastic membership"),
    ] {
        let finished = shells(2, "echo started").launcher_args(args.iter().copied()).run();
        assert_code(&finished, 2);
        assert_says(&finished, &[text]);
        assert_eq!(finished.stdout, "");
    }
}

#[test]
fn a_flag_of_horovod_that_changes_nothing_says_so() {
    let finished = shells(2, "echo started").launcher_args(["--cycle-time-ms", "5"]).run();
    assert_says(&finished, &["hvdrun: --cycle-time-ms changes nothing: there is no cycle"]);
    assert_eq!(finished.assert_success().stdout.matches("started").count(), 2);
}

/// A stand-in for ssh: a script that gets the host and the command.
fn stand_in(script: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("reach.sh");
    std::fs::write(&path, script).expect("a script");
    let command = format!("sh {}", path.display());
    (folder, command)
}

/// Runs the command here, as a host of its own would.
const HERE: &str = "echo Welcome to $1; echo motd >&2; shift; exec sh -c \"$*\"";

#[test]
fn hosts_that_are_reached_by_ssh_form_one_world() {
    // That they are one host after all, the ranks find out.
    let (_folder, ssh) = stand_in(HERE);
    let hosts = ["-H", "127.0.0.2:2,127.0.0.3:1", "--ssh-command", &ssh, "--network-interface", "lo"];
    let seed = hvd_tests::seed().to_string();
    let args = ["conformance", "--expect-backend", "shm", "--seed", &seed];
    worker(3, &args).launcher_args(hosts).run().assert_success();
    let finished = worker(3, &["topology"]).launcher_args(hosts).run();
    let place = "Topology { rank: 2, size: 3, local_rank: 0, local_size: 1, cross_rank: 1, cross_size: 2 }";
    assert!(finished.assert_success().stdout.contains(place), "{}", finished.stdout);
    assert_says(&finished, &["127.0.0.2: motd"]);
}

#[test]
fn the_ranks_of_a_lost_connection_end() {
    let (_folder, ssh) = stand_in("echo reached by $$ >&2; shift; sh -c \"$*\"");
    let mut running = shells(2, FAMILY).launcher_args(["-H", "127.0.0.2:1,127.0.0.3:1", "--ssh-command", &ssh]).start();
    let processes = family(&mut running, 2);
    // The stand-in and its group vanish as ssh does when the connection breaks; the agent is a child of another.
    let connection = processes_after(&running.stderr(), "127.0.0.3: reached by ")[0];
    kill_process(connection, Signal::KILL).expect("a connection to cut");
    running.signal(0, Signal::TERM);
    running.wait();
    assert_ended(&processes);
}

#[test]
fn a_host_that_cannot_be_reached_is_named() {
    let (_folder, refusing) =
        stand_in("[ $1 = bad ] && { exec >&-; echo 'Permission denied (publickey)' >&2; exit 255; }; exec sleep 1000");
    let finished = shells(2, "echo started").launcher_args(["-H", "slow:1,bad:1", "--ssh-command", &refusing]).run();
    assert_code(&finished, 125);
    assert_says(&finished, &["bad: Permission denied", "cannot start rank 1 on the host bad", "ssh bad true"]);
    let silent = ["-H", "slow:2", "--ssh-command", &refusing, "--start-timeout", "0.3"];
    let finished = shells(2, "echo started").launcher_args(silent).run();
    assert_code(&finished, 125);
    assert_says(&finished, &["no answer in 300ms from slow (ranks 0-1)"]);
}
