//! What the runtime tells of itself, on real processes: stalls, and the timeline.

use std::collections::BTreeSet;

use hvd_tests::{Job, binary};

#[test]
fn a_stall_is_warned_of_with_tensors_and_missing_ranks() {
    for shm in [0, 1] {
        let folder = tempfile::tempdir().expect("a folder");
        let go = folder.path().join("go");
        let job = Job::new(binary("hvd-worker"), 3).args(["stall", "--rank", "2", "--until"]).args([&go]);
        let mut running = job.var("HVD_SHM", shm).var("HVD_STALL_CHECK_TIME_SECONDS", 0.5).start();
        // The one that was agreed on before is only a bit to the others, and yet its missing rank is found.
        for text in ["rank 2 did not submit", "`fresh`", "`steps`"] {
            assert!(running.wait_for(text), "no warning with {text}");
        }
        std::fs::write(&go, "").expect("a file");
        let finished = running.wait();
        finished.assert_success();
        assert!(finished.stderr.contains("WARN"), "{}", finished.stderr);
    }
}

#[test]
fn a_stall_ends_the_job_if_it_is_told_to() {
    let job =
        Job::new(binary("hvd-worker"), 3).args(["stall", "--rank", "2"]).var("HVD_STALL_SHUTDOWN_TIME_SECONDS", 0.5);
    let finished = job.run();
    finished.assert_failure();
    // Rank 2, too, hears what it has not submitted.
    let told = finished.stderr.matches("Error: ").count();
    assert_eq!(told, 3, "{}", finished.stderr);
    assert!(finished.stderr.matches("rank 2 did not submit").count() >= 3, "{}", finished.stderr);
    // Nobody is lost: who saw it first ended the job, and the others say so.
    assert!(!finished.stderr.contains("lost rank"), "{}", finished.stderr);
    assert!(finished.complaints[2].contains(" ended the job: stalled: rank 2 did not submit"), "{}", finished.stderr);
}

#[test]
fn a_rank_that_submits_in_another_process_set_than_the_others_is_told_so() {
    let job = Job::new(binary("hvd-worker"), 3).args(["astray"]);
    let finished = job.var_on(1, "HVD_STALL_SHUTDOWN_TIME_SECONDS", 0.5).run();
    finished.assert_failure();
    let text = "rank 1 submitted `astray` in the world, and others wait for its `astray` in the process set [0, 1]";
    let told = finished.complaints.iter().filter(|complaint| complaint.contains(text));
    assert_eq!(told.count(), 3, "{}", finished.stderr);
}

#[test]
fn no_stall_is_seen_where_the_inspector_is_off() {
    let folder = tempfile::tempdir().expect("a folder");
    let go = folder.path().join("go");
    let job = Job::new(binary("hvd-worker"), 2).args(["stall", "--rank", "1", "--until"]).args([&go]);
    let vars =
        [("HVD_STALL_CHECK_TIME_SECONDS", "0.01"), ("HVD_STALL_CHECK_DISABLE", "1"), ("HOROVOD_CYCLE_TIME", "5")];
    let mut running = vars.iter().fold(job, |job, (name, value)| job.var(name, value)).start();
    assert!(running.wait_for("stepping"));
    std::fs::write(&go, "").expect("a file");
    let finished = running.wait();
    finished.assert_success();
    assert!(!finished.stderr.contains("stalled"), "{}", finished.stderr);
    assert!(finished.stderr.contains("HOROVOD_CYCLE_TIME changes nothing"), "{}", finished.stderr);
}

#[test]
fn the_ranks_of_a_host_write_one_timeline_and_a_killed_rank_leaves_it_readable() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("timeline.json");
    let job = Job::new(binary("hvd-worker"), 3).args(["steps", "--count", "1000000000", "--elements", "10"]);
    let mut running = job.var("HVD_TIMELINE", path.display()).start();
    assert!(running.wait_for("stepping"));
    running.kill(1);
    running.wait();
    let text = std::fs::read_to_string(&path).expect("the timeline");
    let events: Vec<serde_json::Value> = serde_json::from_str(&text).expect("an array of events");
    let steps = events.iter().filter(|event| event["name"] == "ALLREDUCE");
    let ranks: BTreeSet<_> = steps.filter_map(|event| event["pid"].as_u64()).collect();
    assert_eq!(ranks, [0, 1, 2].into());
}
