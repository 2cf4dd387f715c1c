//! Checkpoints that are whole, damaged, replaced and left over.

use std::collections::BTreeMap;

use tch::{Device, Kind};

use super::*;

fn state(global_step: u64) -> CheckpointState {
    CheckpointState {
        format_version: FORMAT_VERSION,
        epoch: 0,
        step: global_step,
        global_step,
        loss: Some(1.0 / 3.0),
        best_val_loss: Some(0.1 + 0.2),
        seed: 42,
        global_batch_size: 4,
        batches_per_epoch: 100,
        world_size: 1,
        wall_time: 1.5,
        scaler: None,
        guard: GuardState { skipped: 2, losses: vec![0.1 + 0.2, 1e-300], ..GuardState::default() },
        validations_since_best: 1,
        files: BTreeMap::new(),
    }
}

fn save(folder: &Path, name: &str, global_step: u64) -> PathBuf {
    let weights = Tensor::full([300], global_step as i64, (Kind::Float, Device::Cpu));
    let tensors = [("w".to_string(), weights)];
    let (config, state) = (Config::default(), state(global_step));
    let contents = Contents { model: &tensors, optimizer: &tensors, state: &state, config: &config, tokenizer: None };
    save_checkpoint(folder, name, &contents).unwrap()
}

fn truncate(path: &Path) {
    let length = std::fs::metadata(path).unwrap().len();
    std::fs::File::options().write(true).open(path).unwrap().set_len(length / 2).unwrap();
}

#[test]
fn state_comes_back_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), "final_model", 7);
    let read = verify(&path).unwrap();
    assert_eq!(CheckpointState { files: BTreeMap::new(), ..read.clone() }, state(7));
    assert_eq!(read.files.len(), 3);
}

#[test]
fn a_checkpoint_is_replaced_in_one_step() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), "best_model", 1);
    let path = save(folder.path(), "best_model", 2);
    assert_eq!(verify(&path).unwrap().global_step, 2);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn damaged_checkpoints_are_skipped_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["checkpoint_epoch1_step10", "checkpoint_epoch1_step20", "checkpoint_epoch1_step30"];
    let paths: Vec<PathBuf> =
        names.iter().zip([10, 20, 30]).map(|(name, step)| save(folder.path(), name, step)).collect();
    truncate(&paths[2].join("model.safetensors"));
    std::fs::remove_file(paths[1].join("optimizer.safetensors")).unwrap();
    let cut = save(folder.path(), "checkpoint_epoch1_step40", 40);
    truncate(&cut.join("state.json"));
    std::fs::create_dir(folder.path().join(".tmp-final_model-1")).unwrap();

    let found = find_newest(folder.path()).unwrap();
    assert_eq!(found.newest.unwrap().0, paths[0]);
    let skipped = found.skipped.join("\n");
    for reason in [
        "step40: state.json is damaged",
        "step30: model.safetensors is damaged",
        "step20: optimizer.safetensors is missing",
    ] {
        assert!(skipped.contains(reason), "{skipped}");
    }
}

#[test]
fn leftovers_go_and_a_replaced_folder_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), "best_model", 1);
    std::fs::rename(&path, folder.path().join(".old-best_model")).unwrap();
    std::fs::create_dir(folder.path().join(".tmp-best_model-9")).unwrap();
    std::fs::write(folder.path().join(".tmp-metrics.csv-9"), "x").unwrap();
    clean_leftovers(folder.path()).unwrap();
    assert_eq!(verify(&path).unwrap().global_step, 1);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn only_old_step_checkpoints_are_pruned() {
    let folder = tempfile::tempdir().unwrap();
    for (name, step) in [
        ("checkpoint_epoch1_step9", 9),
        ("checkpoint_epoch1_step10", 10),
        ("checkpoint_epoch2_step11", 11),
        ("checkpoint_epoch1", 1),
        ("best_model", 2),
    ] {
        save(folder.path(), name, step);
    }
    prune(folder.path(), 0).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 5);
    prune(folder.path(), 2).unwrap();
    assert!(!folder.path().join("checkpoint_epoch1_step9").exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4);
}

#[test]
fn what_comes_after_a_resume_is_set_aside_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..2 {
        for (name, step) in [("checkpoint_epoch1_step5", 5), ("checkpoint_epoch1_step9", 9), ("best_model", 10)] {
            save(folder.path(), name, step + round);
        }
        let moved = set_aside_later(folder.path(), 6).unwrap();
        assert_eq!(moved.len(), 2);
        for (name, path) in ["best_model", "checkpoint_epoch1_step9"].iter().zip(&moved) {
            let suffix = if round == 0 { String::new() } else { format!("-{}", round + 1) };
            assert_eq!(*path, folder.path().join("superseded").join(format!("{name}{suffix}")));
            assert!(verify(path).unwrap().global_step > 6);
        }
        assert_eq!(find_newest(folder.path()).unwrap().newest.unwrap().1.global_step, 5 + round);
    }
}

#[test]
fn a_saver_writes_in_order_and_reports_what_failed() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = |step: u64| {
        let weights = [("w".to_string(), Tensor::full([1 << 20], step as i64, (Kind::Float, Device::Cpu)))];
        Snapshot::take(&weights, &weights, state(step), Config::default(), None)
    };
    let mut saver = Saver::new(folder.path().to_path_buf(), 2);
    for step in 1..=4 {
        let taken = snapshot(step);
        saver.save(&format!("checkpoint_epoch1_step{step}"), &taken, false);
        saver.save("best_model", &taken, false);
        saver.prune();
    }
    std::fs::write(folder.path().join("final_model"), "in the way").unwrap();
    saver.save("final_model", &snapshot(5), false);
    let broken = [("w".to_string(), Tensor::from_slice(&[1.0f32, f32::NAN]))];
    saver.save("best_model", &Snapshot::take(&broken, &[], state(6), Config::default(), None), false);
    let failed = saver.finish();
    assert_eq!(failed.iter().map(|(name, _)| &**name).collect::<Vec<_>>(), ["final_model", "best_model"]);
    assert!(failed[1].1.to_string().contains("`w` holds weights that are not finite"), "{}", failed[1].1);
    let mut names: Vec<_> = checkpoints_in(folder.path());
    names.sort();
    assert_eq!(names, ["best_model", "checkpoint_epoch1_step3", "checkpoint_epoch1_step4"]);
    assert!(names.iter().all(|name| verify(&folder.path().join(name)).is_ok()));
    assert_eq!(verify(&folder.path().join("best_model")).unwrap().global_step, 4);
}

#[test]
fn a_snapshot_does_not_change_with_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let weights = [("w".to_string(), Tensor::zeros([10], (Kind::Float, Device::Cpu)))];
    let snapshot = Snapshot::take(&weights, &weights, state(1), Config::default(), None);
    let _ = weights[0].1.shallow_clone().fill_(1.0);
    let mut saver = Saver::new(folder.path().to_path_buf(), 0);
    saver.save("final_model", &snapshot, false);
    assert!(saver.finish().is_empty());
    let read = Tensor::read_safetensors(folder.path().join("final_model/model.safetensors")).unwrap();
    assert_eq!(f64::try_from(read[0].1.sum(Kind::Double)).unwrap(), 0.0);
}

fn checkpoints_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().flatten().filter(|entry| entry.path().is_dir());
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

#[test]
fn a_run_or_a_folder_of_runs_stands_for_its_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    assert!(resolve(folder.path()).unwrap_err().to_string().contains("neither a checkpoint nor a run"));
    assert!(resolve(&folder.path().join("none")).unwrap_err().to_string().contains("no such folder"));
    let run = folder.path().join("20260101_000000_demo");
    let newest = save(&run, "checkpoint_epoch1_step3", 3);
    std::fs::write(run.join("run_metadata.json"), "[]").unwrap();
    for path in [folder.path(), &run, &newest] {
        assert_eq!(resolve(path).unwrap(), newest);
    }
    let best = save(&run, "best_model", 2);
    assert_eq!(resolve(folder.path()).unwrap(), best);
}
