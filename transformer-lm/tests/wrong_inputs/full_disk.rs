//! A disk that is too small for all checkpoints.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use transformer_lm::checkpoint::verify;

use super::lab::{Lab, RUN, run};
use super::skipped::skipped;

/// A file system of its own in memory; goes with the value.
struct Disk(TempDir);

impl Disk {
    /// None, with a message, where that cannot be had.
    fn new(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "none"], folder.path());
        if !mounted {
            skipped("only root may mount a file system");
        }
        mounted.then(|| Disk(folder))
    }

    fn grow(&self, size: &str) {
        assert!(mount(&["-o", &format!("remount,size={size}")], self.0.path()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn mount(args: &[&str], folder: &Path) -> bool {
    Command::new("mount").args(args).arg(folder).output().is_ok_and(|output| output.status.success())
}

/// The entries of the one folder in `parent`.
fn run_in(parent: &Path) -> (PathBuf, Vec<String>) {
    let run = fs::read_dir(parent).unwrap().next().unwrap().unwrap().path();
    let names = fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    (run, names)
}

#[test]
fn records_that_are_lost_are_counted() {
    let Some(disk) = Disk::new("32k") else { return };
    let lab = Lab::new();
    let folder = lab.folder();
    let line = format!(
        "train --config config.yaml --run_name full --set training.max_steps=100 --set training.save_interval=0 \
         --set paths.log_dir={}",
        disk.0.path().display()
    );
    let output = run(folder.path(), &line);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("warning: a row was not recorded: cannot write "), "{said}");
    let counted = said
        .lines()
        .filter_map(|line| line.strip_prefix("warning: ")?.split_once(" records (rows, ")?.0.parse::<usize>().ok());
    let counted: usize = counted.sum();

    // What is in both files, or for a sample in its own, was recorded.
    let (logs, _) = run_in(disk.0.path());
    let csv = fs::read_to_string(logs.join("metrics.csv")).unwrap();
    let json = fs::read_to_string(logs.join("metrics.jsonl")).unwrap();
    let is_whole = |line: &&str| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        let (phase, step) = (record["phase"].as_str().unwrap(), &record["global_step"]);
        let row = |row: &str| row.starts_with(&format!("{phase},")) && row.split(',').nth(3) == Some(&step.to_string());
        phase == "sample" || csv.lines().any(row)
    };
    let whole = json.lines().filter(is_whole).count();
    let all = said.lines().filter(|line| line.starts_with("epoch ") || line.starts_with("sample | ")).count();
    assert!(all > 100 && counted > 0, "{said}");
    assert_eq!(counted, all - whole, "{said}");
}

#[test]
fn training_goes_on_and_older_checkpoints_stay() {
    let Some(disk) = Disk::new("700k") else { return };
    let lab = Lab::new();
    let folder = lab.folder();
    let train = "train --config config.yaml --run_name full --set training.max_steps=12 --set training.save_interval=1 \
                 --set training.keep_checkpoints=0 --set training.eval_interval=0";
    let there = format!(
        "{train} --set paths.checkpoint_dir={} --set paths.log_dir=logs --set paths.tensorboard_dir=tensorboard",
        disk.0.path().display()
    );

    let output = run(folder.path(), &there);
    let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{said}{complaint}");
    assert!(said.contains("_step11 was not saved: ") && said.contains("No space left on device"), "{said}");
    assert!(complaint.contains("final_model") && complaint.contains("No space left on device"), "{complaint}");
    assert!(!said.contains("IoError") && !complaint.contains("IoError"), "{said}{complaint}");

    // All updates were made, and what was saved before is whole.
    let (logs, _) = run_in(&folder.path().join("logs"));
    let rows = fs::read_to_string(logs.join("metrics.csv")).unwrap();
    assert_eq!(rows.lines().filter(|row| row.starts_with("train,")).count(), 12, "{rows}");
    let (saved, names) = run_in(disk.0.path());
    let checkpoints: Vec<&String> = names.iter().filter(|name| name.starts_with("checkpoint_")).collect();
    assert!((2..11).contains(&checkpoints.len()) && !names.iter().any(|name| name.starts_with('.')), "{names:?}");
    for name in checkpoints {
        verify(&saved.join(name)).unwrap();
    }

    // Where there is room again, it goes on as if nothing had happened.
    disk.grow("16m");
    let output = run(folder.path(), &format!("{there} --resume auto"));
    assert!(output.status.success(), "{output:?}");
    let output = run(folder.path(), &format!("{train} --output_dir undisturbed"));
    assert!(output.status.success(), "{output:?}");
    let (undisturbed, _) = run_in(&folder.path().join("undisturbed"));
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let weights = |run: &Path| fs::read(run.join("final_model").join(name)).unwrap();
        assert!(weights(&saved) == weights(&undisturbed), "{name} differs");
    }
}

#[test]
fn models_that_do_not_fit_are_refused_in_the_systems_words() {
    let Some(disk) = Disk::new("16k") else { return };
    let folder = Lab::new().folder();
    let made = run(folder.path(), &format!("lm export --checkpoint {RUN} --output exported"));
    assert!(made.status.success(), "{made:?}");
    for line in [format!("lm export --checkpoint {RUN}"), "lm import --input exported".into()] {
        let output = run(folder.path(), &format!("{line} --output {}/new", disk.0.path().display()));
        let complaint = String::from_utf8_lossy(&output.stderr);
        let expected = "model.safetensors: No space left on device (os error 28)\n";
        assert!(output.status.code() == Some(1) && complaint.ends_with(expected), "{line}: {complaint}");
        assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 0, "{line}");
    }
}
