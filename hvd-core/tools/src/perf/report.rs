//! What rank 0 prints: a table, or a line of JSON for each size.

use std::io::Write;

use anyhow::{Context, Result};
use hvd_core::World;
use serde::Serialize;

use super::args::Args;
use super::case::{Case, human};
use super::check::Value;

/// One size's result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    bench: String,
    ranks: usize,
    bytes: usize,
    count: usize,
    median_us: f64,
    min_us: f64,
    algbw_gbps: f64,
    busbw_gbps: f64,
    backend: String,
    buffer: &'static str,
    dtype: String,
    op: String,
    compression: &'static str,
    iters: usize,
    /// Wrong elements on all ranks; `None` where nobody looked.
    errors: Option<u64>,
}

impl Row {
    /// `seconds`: an iteration's each, ascending.
    pub fn new<T: Value>(world: &World, args: &Args, case: &Case<'_, T>, seconds: &[f64], errors: Option<u64>) -> Self {
        let (median, bytes) = (seconds[seconds.len() / 2], case.bytes());
        let algbw = bytes as f64 / median / 1e9;
        Row {
            bench: case.name(),
            ranks: world.size(),
            bytes,
            count: bytes / args.dtype.0.size(),
            median_us: round(median * 1e6, 1),
            min_us: round(seconds[0] * 1e6, 1),
            algbw_gbps: round(algbw, 3),
            busbw_gbps: round(algbw * case.bus_factor(), 3),
            backend: world.backend().to_string(),
            buffer: args.buffer.name(),
            dtype: args.dtype.0.to_string(),
            op: if args.reduces() { args.op().name() } else { "-".into() },
            compression: args.compression.name(),
            iters: seconds.len(),
            errors,
        }
    }
}

/// What a world costs while nothing is submitted.
#[derive(Clone, Debug, Serialize)]
pub struct Idle {
    bench: &'static str,
    ranks: usize,
    backend: String,
    seconds: u64,
    /// Of the busiest rank.
    percent_of_a_core: f64,
}

impl Idle {
    /// `share`: of a core, that the busiest rank used for so many seconds.
    pub fn new(world: &World, seconds: u64, share: f64) -> Self {
        let (ranks, backend) = (world.size(), world.backend().to_string());
        Idle { bench: "idle", ranks, backend, seconds, percent_of_a_core: round(share * 100.0, 3) }
    }
}

fn round(value: f64, places: i32) -> f64 {
    let unit = 10f64.powi(places);
    (value * unit).round() / unit
}

/// Prints rows as they come, on rank 0.
pub struct Report {
    prints: bool,
    json: bool,
}

impl Report {
    /// Prints the table's head, if it is to be a table.
    ///
    /// # Errors
    /// Where standard output takes nothing.
    pub fn new(world: &World, args: &Args) -> Result<Self> {
        let report = Report { prints: world.rank() == 0, json: args.json };
        if report.prints && !report.json {
            let (backend, buffer) = (world.backend(), args.buffer.name());
            let (bench, compression) = (args.bench.name(), args.compression.name());
            let what = format!("# {bench}: ranks {}, backend {backend}, buffer {buffer}", world.size());
            print(&format!("{what}, compression {compression}"))?;
            print(&format!(
                "{:>9} {:>12} {:>5} {:>8} {:>11} {:>11} {:>9} {:>9} {:>7}",
                "size", "count", "type", "op", "median us", "min us", "alg GB/s", "bus GB/s", "errors"
            ))?;
        }
        Ok(report)
    }

    /// Prints what an idle world costs.
    ///
    /// # Errors
    /// As [`Report::new`].
    pub fn idle(&self, idle: &Idle) -> Result<()> {
        match (self.prints, self.json) {
            (false, _) => Ok(()),
            (true, true) => print(&serde_json::to_string(idle)?),
            (true, false) => {
                let Idle { seconds, percent_of_a_core, .. } = idle;
                print(&format!("# Idle for {seconds} s: the busiest rank used {percent_of_a_core} % of a core"))
            }
        }
    }

    /// Prints one size's result.
    ///
    /// # Errors
    /// As [`Report::new`].
    pub fn row(&self, row: &Row) -> Result<()> {
        match (self.prints, self.json) {
            (false, _) => Ok(()),
            (true, true) => print(&serde_json::to_string(row)?),
            (true, false) => print(&format!(
                "{:>9} {:>12} {:>5} {:>8} {:>11.1} {:>11.1} {:>9.3} {:>9.3} {:>7}",
                human(row.bytes),
                row.count,
                row.dtype,
                row.op,
                row.median_us,
                row.min_us,
                row.algbw_gbps,
                row.busbw_gbps,
                row.errors.map_or("-".into(), |errors| errors.to_string())
            )),
        }
    }
}

/// A line at once: a row is seen when it is measured, and a closed pipe is an error rather than a panic.
fn print(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).context("cannot write to standard output")
}
