//! Writes one figure to all places at once.

use super::progress::thousands;
use super::{EventFile, Figures, Histogram, MetricsCsv, MetricsJsonl, Phase, Progress, Row, RunFolder};
use crate::Result;

/// Rank 0's record: `metrics.csv`, `metrics.jsonl`, TensorBoard and the screen.
#[derive(Debug)]
pub struct Recorder {
    csv: MetricsCsv,
    jsonl: MetricsJsonl,
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
            jsonl: MetricsJsonl::open(&run.logs.join("metrics.jsonl"), global_step)?,
            events: EventFile::create(&run.tensorboard)?,
        })
    }

    /// Says a row and records it.
    ///
    /// # Errors
    /// [`crate::Error::Io`], the first one; each place that could be written has the row.
    pub fn record(&mut self, row: &Row, detail: &str, progress: &Progress) -> Result<()> {
        progress.line(&format!("{}{detail}", line(row)));
        let outcomes = [self.csv.append(row), self.jsonl.append(row), self.scalars(row)];
        outcomes.into_iter().collect()
    }

    /// Says a sample of text and records it.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn sample(&mut self, global_step: u64, text: &str, progress: &Progress) -> Result<()> {
        progress.line(&format!("sample | step {global_step} | {text:?}"));
        self.jsonl.append_sample(global_step, text)
    }

    /// Records the distribution of a tensor's elements.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn histogram(&mut self, tag: &str, global_step: u64, histogram: &Histogram) -> Result<()> {
        self.events.histogram(tag, global_step, histogram)
    }

    fn scalars(&mut self, row: &Row) -> Result<()> {
        let (phase, step) = (row.phase.name(), row.global_step);
        let mut values = vec![("loss", row.loss), ("perplexity", row.perplexity)];
        values.extend(row.accuracy.map(|accuracy| ("accuracy", accuracy)));
        if row.phase == Phase::Train {
            values.extend([("learning_rate", row.lr), ("throughput", row.throughput)]);
        }
        values.extend(row.more.named());
        values.iter().try_for_each(|(name, value)| self.events.scalar(&format!("{phase}/{name}"), step, *value))
    }
}

fn line(row: &Row) -> String {
    let Row { epoch, global_step, loss, perplexity, lr, throughput, .. } = row;
    let accuracy = row.accuracy.map(|a| format!(" | accuracy {:.2} %", 100.0 * a)).unwrap_or_default();
    let place = format!("epoch {epoch} | step {global_step}");
    let more = details(&row.more);
    match row.phase {
        Phase::Train => {
            let speed = thousands(*throughput);
            format!(
                "{place} | loss {loss:.4} | perplexity {perplexity:.2}{accuracy} | lr {lr:.2e}{more} | {speed} tokens/s"
            )
        }
        Phase::Val => format!("{place} | validation loss {loss:.4} | perplexity {perplexity:.2}{accuracy}{more}"),
    }
}

fn details(more: &Figures) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let parts = [
        more.bits_per_byte.map(|bits| format!("{bits:.4} bits per byte")),
        more.tokens.map(|tokens| format!("{} tokens", thousands(tokens as f64))),
        more.grad_norm.map(|norm| format!("gradient norm {norm:.3}")),
        more.step_ms.map(|ms| format!("{ms:.1} ms")),
        more.mfu.map(|mfu| format!("MFU {}", percent(mfu))),
        more.memory_bytes.map(|bytes| format!("{} MiB", thousands(bytes as f64 / f64::from(1 << 20)))),
        more.waiting.map(|share| format!("waiting {}", percent(share))),
        more.skipped.filter(|count| *count > 0).map(|count| format!("{count} skipped")),
    ];
    parts.into_iter().flatten().map(|part| format!(" | {part}")).collect()
}
