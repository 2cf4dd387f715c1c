//! `metrics.csv`: one row at a time, flushed, and cut back when a run resumes.

use std::path::Path;

use super::Row;
use super::lines::Lines;
use crate::Result;

/// The first line of `metrics.csv`.
pub const HEADER: &str = "phase,epoch,update,global_step,lr,loss,perplexity,accuracy,throughput,wall_time";

/// The row as a line of the file. Numbers are the shortest that read back as the same `f64`.
fn line(row: &Row) -> String {
    let Row { epoch, update, global_step, lr, loss, perplexity, throughput, wall_time, .. } = row;
    let (phase, accuracy) = (row.phase.name(), row.accuracy.map(|a| a.to_string()).unwrap_or_default());
    format!(
        "{phase},{epoch},{update},{global_step},{lr},{loss},{perplexity},{accuracy},{throughput:.1},{wall_time:.3}\n"
    )
}

/// The open file.
#[derive(Debug)]
pub struct MetricsCsv(Lines);

impl MetricsCsv {
    /// Opens `path` to go on after `global_step`: rows of later steps and a row that a kill cut short are dropped.
    /// A file that is not there starts with the header.
    ///
    /// # Errors
    /// [`crate::Error::Io`], or [`crate::Error::Data`] where the file has another header.
    pub fn open(path: &Path, global_step: u64) -> Result<MetricsCsv> {
        Lines::open(path, |text| keep(text, global_step)).map(MetricsCsv)
    }

    /// Appends a row; it has reached the operating system when this returns.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; the file is then as it was.
    pub fn append(&mut self, row: &Row) -> Result<()> {
        self.0.append(&line(row))
    }
}

/// The header and the whole rows of steps up to `global_step`.
fn keep(text: &str, global_step: u64) -> std::result::Result<String, String> {
    let columns = HEADER.split(',').count();
    let mut lines = text.split_inclusive('\n');
    match lines.next().map(str::trim_end) {
        None => return Ok(format!("{HEADER}\n")),
        Some(header) if header == HEADER || HEADER.starts_with(header) => {}
        Some(header) => return Err(format!("its header is `{header}`, expected `{HEADER}`; move the file away")),
    }
    let rows = lines.filter(|line| {
        let fields: Vec<&str> = line.trim_end().split(',').collect();
        let step = fields.get(3).and_then(|field| field.parse::<u64>().ok());
        line.ends_with('\n') && fields.len() == columns && step.is_some_and(|step| step <= global_step)
    });
    Ok(std::iter::once(format!("{HEADER}\n")).chain(rows.map(String::from)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Figures, Phase};

    fn row(phase: Phase, global_step: u64) -> Row {
        let loss: f64 = 1.0 / 3.0;
        Row {
            phase,
            epoch: 1,
            update: 2,
            global_step,
            lr: 1e-3,
            loss,
            perplexity: loss.exp(),
            accuracy: Some(0.25),
            throughput: 10.0,
            wall_time: 1.5,
            more: Figures::default(),
        }
    }

    #[test]
    fn rows_after_the_checkpoint_are_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.csv");
        let mut csv = MetricsCsv::open(&path, 0).unwrap();
        for step in [10, 20, 30] {
            csv.append(&row(Phase::Train, step)).unwrap();
        }
        csv.append(&row(Phase::Val, 20)).unwrap();
        let mut whole = std::fs::read_to_string(&path).unwrap();
        whole.push_str("train,1,9,1");
        std::fs::write(&path, &whole).unwrap();

        let mut csv = MetricsCsv::open(&path, 20).unwrap();
        csv.append(&row(Phase::Train, 30)).unwrap();
        let steps: Vec<String> = std::fs::read_to_string(&path)
            .unwrap()
            .lines()
            .map(|line| line.split(',').nth(3).unwrap().to_string())
            .collect();
        assert_eq!(steps, ["global_step", "10", "20", "20", "30"]);
    }

    #[test]
    fn a_row_has_the_columns_of_the_header() {
        let line = line(&row(Phase::Train, 7));
        assert_eq!(line, "train,1,2,7,0.001,0.3333333333333333,1.3956124250860895,0.25,10.0,1.500\n");
        assert_eq!(line.split(',').count(), HEADER.split(',').count());
    }

    #[test]
    fn anothers_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.csv");
        std::fs::write(&path, "a,b\n1,2\n").unwrap();
        assert!(MetricsCsv::open(&path, 0).unwrap_err().to_string().contains("its header is `a,b`"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a,b\n1,2\n");
    }
}
