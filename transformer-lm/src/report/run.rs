//! What a run recorded, as curves.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// Columns that say where a row belongs, not what was measured.
const PLACES: [&str; 4] = ["phase", "epoch", "update", "global_step"];

/// A run's figures.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// The folder's name.
    pub name: String,
    /// By `phase/column`: updates and values, in the order they were recorded.
    pub curves: BTreeMap<String, Vec<(f64, f64)>>,
    /// The last text that the model wrote, and after how many updates.
    pub sample: Option<(u64, String)>,
}

impl Run {
    /// Reads `metrics.jsonl` of a run's folder, or `metrics.csv` where there is none.
    ///
    /// # Errors
    /// Neither is there, or one has a line that is no row. A last line that a kill cut short is left out.
    pub(super) fn read(folder: &Path) -> Result<Run> {
        let name = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut run = Run { name, ..Run::default() };
        let (jsonl, csv) = (folder.join("metrics.jsonl"), folder.join("metrics.csv"));
        if jsonl.is_file() {
            run.lines(&jsonl, |line| serde_json::from_str(line).ok())?;
        } else if csv.is_file() {
            let mut header: Option<Vec<String>> = None;
            run.lines(&csv, |line| {
                let cells = line.split(',').map(str::to_owned).collect();
                let Some(header) = &header else {
                    header = Some(cells);
                    return Some(Value::Null);
                };
                (cells.len() == header.len())
                    .then(|| header.iter().cloned().zip(cells.iter().map(|c| cell(c))).collect())
            })?;
        } else {
            return Err(Error::data(folder, "neither metrics.jsonl nor metrics.csv here; expected a run's folder"));
        }
        Ok(run)
    }

    fn lines(&mut self, path: &Path, mut parse: impl FnMut(&str) -> Option<Value>) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        for (line, number) in text.split_inclusive('\n').zip(1..).filter(|(line, _)| line.ends_with('\n')) {
            let row = parse(line.trim_end()).ok_or_else(|| Error::data(path, format!("line {number} is no row")))?;
            self.add(&row);
        }
        Ok(())
    }

    fn add(&mut self, row: &Value) {
        let (Some(phase), Some(step)) = (row["phase"].as_str(), row["global_step"].as_u64()) else { return };
        if let Some(text) = row["text"].as_str() {
            self.sample = Some((step, text.to_owned()));
        }
        for (column, value) in row.as_object().into_iter().flatten() {
            if let Some(value) = value.as_f64().filter(|_| !PLACES.contains(&column.as_str())) {
                let (column, value) = in_mib(column, value);
                self.curves.entry(format!("{phase}/{column}")).or_default().push((step as f64, value));
            }
        }
    }

    /// The last value of a curve.
    pub(super) fn last(&self, curve: &str) -> Option<f64> {
        self.curves.get(curve)?.last().map(|point| point.1)
    }

    /// The lowest value of a curve.
    pub(super) fn lowest(&self, curve: &str) -> Option<f64> {
        self.curves.get(curve)?.iter().map(|point| point.1).min_by(f64::total_cmp)
    }

    /// Updates that were recorded.
    pub(super) fn updates(&self) -> u64 {
        self.curves.values().flatten().map(|point| point.0 as u64).max().unwrap_or(0)
    }
}

/// A column of bytes in MiB, others as they are.
fn in_mib(column: &str, value: f64) -> (String, f64) {
    match column.strip_suffix("_bytes") {
        Some(what) => (format!("{what}_mib"), value / f64::from(1 << 20)),
        None => (column.to_owned(), value),
    }
}

/// A cell of a CSV file: a number where it is one.
fn cell(text: &str) -> Value {
    serde_json::from_str(text).ok().filter(Value::is_number).unwrap_or_else(|| text.into())
}
