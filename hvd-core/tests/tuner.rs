//! The tuner in a world of threads: all ranks switch at the same point, and what was set stays.

use hvd_core::config::Config;
use hvd_core::{Error, ReduceOp, World};

/// Reduces tensors of sizes on both sides of every limit until the tuner has ended, and checks every sum.
fn train(world: &World, steps: usize) -> Result<(), Error> {
    let lengths = [3usize, 100, 5000, 40_000];
    for _ in 0..steps {
        let submit = |(i, &length): (usize, &usize)| {
            world.allreduce_async(&format!("t{i}"), vec![world.rank() as f32 + 1.0; length], ReduceOp::Sum)
        };
        let handles: Vec<_> = lengths.iter().enumerate().map(submit).collect::<Result<_, _>>()?;
        let expected = (world.size() * (world.size() + 1) / 2) as f32;
        for handle in handles {
            assert!(handle.wait()?.iter().all(|&sum| sum == expected));
        }
        // Of different lengths, so that its pieces differ.
        let gathered = world.allgather("g", &vec![world.rank() as u8; 30_000 * (world.rank() + 1)])?;
        assert_eq!(gathered.len(), 30_000 * world.size() * (world.size() + 1) / 2);
    }
    Ok(())
}

#[test]
fn sums_are_right_while_the_tuner_changes_settings() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("tuner.csv");
    let mut config = Config::default();
    config.autotune.enabled = true;
    config.autotune.log = Some(log.clone());
    config.autotune.warmup_samples = 1;
    config.autotune.steps_per_sample = 2;
    config.autotune.max_samples = 40;
    config.autotune.fixed.insert("HVD_FUSION_THRESHOLD");
    for result in World::threads_with(3, &config, |world| {
        train(&world, 2 * 41 + 60)?;
        world.shutdown()
    }) {
        result.expect("no rank fails");
    }

    let log = std::fs::read_to_string(log).expect("the log");
    let rows: Vec<Vec<&str>> = log.lines().skip(1).map(|line| line.split(',').collect()).collect();
    let samples: Vec<_> = rows.iter().filter(|row| row[0] == "sample").collect();
    assert!(samples.len() >= 6 && samples.len() <= 40, "{log}");
    let default = Config::default().fusion_threshold_bytes.to_string();
    assert!(rows.iter().all(|row| row[2] == default), "a fixed setting was changed: {log}");
    assert!(samples.iter().any(|row| row[3..5] != samples[0][3..5]), "nothing was tried: {log}");
    let best = rows.last().expect("rows");
    assert_eq!(best[0], "best");
    assert!(samples.iter().any(|row| row[2..5] == best[2..5]), "the best was never tried: {log}");
}
