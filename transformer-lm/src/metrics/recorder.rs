//! Writes one figure to all places at once.

use super::progress::thousands;
use super::{EventFile, MetricsCsv, Phase, Progress, Row, RunFolder};
use crate::Result;

/// Rank 0's record: `metrics.csv`, TensorBoard and the screen.
#[derive(Debug)]
pub struct Recorder {
    csv: MetricsCsv,
    events: EventFile,
}

impl Recorder {
    /// Opens the record of `run` to go on after `global_step`.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn open(run: &RunFolder, global_step: u64) -> Result<Recorder> {
        Ok(Recorder {
            csv: MetricsCsv::open(&run.logs.join("metrics.csv"), global_step)?,
            events: EventFile::create(&run.tensorboard)?,
        })
    }

    /// Records a row and says it.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn record(&mut self, row: &Row, detail: &str, progress: &Progress) -> Result<()> {
        self.csv.append(row)?;
        let (phase, step) = (row.phase.name(), row.global_step);
        self.events.scalar(&format!("{phase}/loss"), step, row.loss)?;
        self.events.scalar(&format!("{phase}/perplexity"), step, row.perplexity())?;
        if let Some(accuracy) = row.accuracy {
            self.events.scalar(&format!("{phase}/accuracy"), step, accuracy)?;
        }
        if row.phase == Phase::Train {
            self.events.scalar("train/learning_rate", step, row.lr)?;
        }
        progress.line(&line(row, detail));
        Ok(())
    }
}

fn line(row: &Row, detail: &str) -> String {
    let Row { epoch, global_step, loss, lr, throughput, .. } = row;
    let accuracy = row.accuracy.map(|a| format!(" | accuracy {:.2} %", 100.0 * a)).unwrap_or_default();
    let perplexity = row.perplexity();
    match row.phase {
        Phase::Train => format!(
            "epoch {epoch} | step {global_step} | loss {loss:.4} | perplexity {perplexity:.2}{accuracy} | lr {lr:.2e} | {} \
             tokens/s{detail}",
            thousands(*throughput)
        ),
        Phase::Val => format!(
            "epoch {epoch} | step {global_step} | validation loss {loss:.4} | perplexity {perplexity:.2}{accuracy}{detail}"
        ),
    }
}
