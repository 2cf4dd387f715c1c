//! Ranks that die, panic or leave: the others end soon, say who it was, and nothing is left behind.

use std::time::{Duration, Instant};

use hvd_tests::{Job, Launcher, Running, binary, seed};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Signal, kill_process, test_kill_process};

/// From the death of a rank to the end of the last of the others.
const LIMIT: Duration = Duration::from_secs(10);

fn worker(ranks: usize, args: &[&str]) -> Job {
    Job::new(binary("hvd-worker"), ranks).args(args.iter().copied())
}

/// Kills `victim`, and checks the end of the others.
fn kill_and_check(running: Running, victim: usize) {
    running.kill(victim);
    let killed = Instant::now();
    let finished = running.wait();
    assert!(killed.elapsed() < LIMIT, "it took {:?}", killed.elapsed());
    let named = format!("rank {victim}");
    finished.assert_failure();
    let of_start = ["rendezvous failed", "did not come", "missing"];
    let explained = finished.stderr.contains(&named) || of_start.iter().any(|text| finished.stderr.contains(text));
    assert!(explained, "nobody named {named}:\n{}", finished.stderr);
}

#[test]
fn a_rank_killed_at_any_moment_ends_the_job() {
    let mut random = ChaCha8Rng::seed_from_u64(seed());
    for (shm, elements) in [(1, 10), (1, 3_000_000), (0, 10), (0, 3_000_000)] {
        for phase in ["", "started", "stepping"] {
            let ranks = random.random_range(2..=4);
            let victim = random.random_range(0..ranks);
            let elements = elements.to_string();
            let job = worker(ranks, &["steps", "--count", "1000000000", "--elements", &elements]);
            // Without a launcher nobody can know of a rank that dies before the others have met it.
            let mut running = job.var("HVD_SHM", shm).var("HVD_START_TIMEOUT", 5).start();
            assert!(phase.is_empty() || running.wait_for(phase), "the job ended by itself");
            // Somewhere within the phase; not to wait for anything.
            std::thread::sleep(Duration::from_micros(random.random_range(0..40_000)));
            kill_and_check(running, victim);
        }
    }
}

#[test]
fn under_mpirun_a_killed_rank_or_a_killed_mpirun_ends_all() {
    for launcher in Launcher::available().into_iter().filter(|launcher| *launcher != Launcher::Spawn) {
        for kill_launcher in [false, true] {
            let job = worker(3, &["steps", "--count", "1000000000", "--elements", "100000"]).launcher(launcher);
            let mut running = job.start();
            assert!(running.wait_for("stepping"), "the job ended by itself");
            let processes: Vec<_> = (0..3).map(|rank| running.process_of(rank).expect("a process id")).collect();
            match kill_launcher {
                true => running.kill(0),
                false => kill_process(processes[1], Signal::KILL).expect("a process to kill"),
            }
            let killed = Instant::now();
            running.wait().assert_failure();
            while processes.iter().any(|&process| test_kill_process(process).is_ok()) {
                assert!(killed.elapsed() < LIMIT, "{launcher:?}: ranks are still there after {LIMIT:?}");
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn a_panic_ends_the_job_and_its_message_is_seen() {
    let finished = worker(3, &["panic", "--rank", "1"]).run();
    finished.assert_failure();
    assert!(finished.elapsed < LIMIT, "{:?}", finished.elapsed);
    assert!(finished.stderr.contains("this rank was told to panic"), "{}", finished.stderr);
    assert!(finished.stderr.contains("lost rank 1"), "{}", finished.stderr);
}

#[test]
fn a_rank_that_leaves_without_a_word_ends_the_job() {
    let finished = worker(3, &["leave", "--rank", "2"]).run();
    assert!(finished.elapsed < LIMIT, "{:?}", finished.elapsed);
    assert!(finished.stderr.contains("lost rank 2"), "{}", finished.stderr);
    assert_eq!(finished.statuses.iter().filter(|status| status.success()).count(), 1, "{:?}", finished.statuses);
}

#[test]
fn worlds_follow_each_other_in_one_process_also_after_a_failure() {
    for shm in [0, 1] {
        let finished = worker(3, &["again", "--worlds", "8"]).var("HVD_SHM", shm).run();
        assert!(finished.assert_success().stdout.contains("8 worlds"));
    }
}

#[test]
fn a_process_can_be_in_several_worlds() {
    for shm in [0, 1] {
        let finished = worker(3, &["twice"]).var("HVD_SHM", shm).run();
        assert!(finished.assert_success().stdout.contains("two worlds"));
    }
}

#[test]
fn a_killed_job_does_not_disturb_the_next_of_its_name() {
    let name = format!("again-{}", std::process::id());
    for _ in 0..3 {
        let job = worker(3, &["steps", "--count", "1000000000", "--elements", "1000"]).var("HVD_JOB_ID", &name);
        let mut running = job.start();
        assert!(running.wait_for("stepping"), "the job ended by itself:\n{}", running.stderr());
        (0..3).for_each(|rank| running.kill(rank));
        running.wait();
    }
    worker(3, &["steps", "--count", "3", "--elements", "1000"]).var("HVD_JOB_ID", &name).run().assert_success();
}

#[test]
fn jobs_on_one_host_do_not_meet() {
    let start = || worker(2, &["again", "--worlds", "6"]).start();
    let jobs: Vec<_> = (0..4).map(|_| start()).collect();
    for job in jobs {
        assert_eq!(job.wait().assert_success().stdout.matches("6 worlds").count(), 2);
    }
}

#[test]
fn ranks_with_different_settings_refuse_each_other() {
    let settings = [("HVD_SHM", "0"), ("HVD_CACHE_CAPACITY", "7"), ("HVD_PEER_TIMEOUT", "0"), ("HVD_TRANSPORT", "mpi")];
    for (name, value) in settings {
        let finished = worker(3, &["steps", "--count", "3", "--elements", "10"]).var_on(1, name, value).run();
        finished.assert_failure();
        assert!(finished.elapsed < LIMIT, "{:?}", finished.elapsed);
        for complaint in &finished.complaints {
            let expected = format!("`{value}` on rank 1; give all ranks the same");
            assert!(complaint.contains(name) && complaint.contains(&expected), "{complaint}");
        }
    }
}
