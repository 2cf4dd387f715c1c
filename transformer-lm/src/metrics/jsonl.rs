//! `metrics.jsonl`: every figure of a row, and samples of text, one JSON object on each line.

use std::path::Path;

use serde_json::{Value, json};

use super::Row;
use super::lines::Lines;
use crate::Result;

/// The open file.
#[derive(Debug)]
pub struct MetricsJsonl(Lines);

impl MetricsJsonl {
    /// Opens `path` to go on after `global_step`: lines of later steps and one that a kill cut short are dropped.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn open(path: &Path, global_step: u64) -> Result<MetricsJsonl> {
        Lines::open(path, |text| Ok(keep(text, global_step))).map(MetricsJsonl)
    }

    /// Appends a row.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; the file is then as it was.
    pub fn append(&mut self, row: &Row) -> Result<()> {
        self.append_value(&serde_json::to_value(row).unwrap_or_default())
    }

    /// Appends what the model wrote after `global_step` updates.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; the file is then as it was.
    pub fn append_sample(&mut self, global_step: u64, text: &str) -> Result<()> {
        self.append_value(&json!({ "phase": "sample", "global_step": global_step, "text": text }))
    }

    fn append_value(&mut self, value: &Value) -> Result<()> {
        self.0.append(&format!("{value}\n"))
    }
}

fn keep(text: &str, global_step: u64) -> String {
    let step = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("global_step")?.as_u64();
    let stays = |line: &&str| line.ends_with('\n') && step(line).is_some_and(|step| step <= global_step);
    text.split_inclusive('\n').filter(stays).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_after_the_checkpoint_are_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = MetricsJsonl::open(&path, 0).unwrap();
        for step in [10, 20, 30] {
            file.append_sample(step, "two\nlines").unwrap();
        }
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{{\"global_step\": 1")).unwrap();
        MetricsJsonl::open(&path, 20).unwrap();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept.lines().count(), 2);
        assert!(whole.starts_with(&kept) && kept.ends_with("\n"));
    }
}
