//! `run_metadata.json`: when, where and on what a run was started, one entry for each start.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Result;

/// Variables that say under which scheduler or launcher a run was started begin with one of these.
const SCHEDULERS: &[&str] = &["SLURM_", "PBS_", "LSB_", "SGE_", "OMPI_COMM_", "PMI_", "HVD_RANK", "HVD_SIZE"];

/// One start of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunMetadata {
    /// When, in local time with its offset, as RFC 3339 writes it.
    pub time: String,
    /// The host of rank 0.
    pub host: String,
    /// The command line.
    pub command: Vec<String>,
    /// The commit of the working folder, where it is a git checkout.
    pub git_commit: Option<String>,
    /// The checkpoint that the run went on from.
    pub resumed_from: Option<String>,
    /// What the launcher and the scheduler set.
    pub scheduler: BTreeMap<String, String>,
    /// Versions of the parts.
    pub versions: BTreeMap<String, String>,
    /// Each rank's host and device, by rank.
    pub devices: Vec<Device>,
}

/// Where a rank computes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Device {
    /// Host name.
    pub host: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Threads of the rank.
    pub threads: usize,
    /// Floating-point operations per second that the rank can do, as measured at the start; 0 where it was not.
    #[serde(default)]
    pub peak_flops: f64,
}

impl RunMetadata {
    /// Describes this process; `devices` were gathered from all ranks.
    pub fn collect(devices: Vec<Device>, resumed_from: Option<&Path>) -> RunMetadata {
        let version = |name: &str, version: &str| (name.to_string(), version.to_string());
        let is_scheduler = |(name, _): &(String, String)| SCHEDULERS.iter().any(|prefix| name.starts_with(prefix));
        RunMetadata {
            time: jiff::Zoned::now().strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
            host: host(),
            command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
            git_commit: git_commit(),
            resumed_from: resumed_from.map(|path| path.display().to_string()),
            scheduler: text_vars().filter(is_scheduler).collect(),
            versions: [version("transformer-lm", env!("CARGO_PKG_VERSION")), version("tch", "0.24.0")].into(),
            devices,
        }
    }

    /// Adds this start to the folder's `run_metadata.json`.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn append(self, root: &Path) -> Result<()> {
        let path = root.join("run_metadata.json");
        let before = std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut starts: Vec<serde_json::Value> = before.unwrap_or_default();
        starts.push(serde_json::to_value(self).unwrap_or_default());
        let text = serde_json::to_string_pretty(&starts).unwrap_or_default();
        crate::checkpoint::write_atomically(&path, text.as_bytes())
    }
}

/// Variables of the environment that are text.
fn text_vars() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// This host's name.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn git_commit() -> Option<String> {
    let output = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_string())
}
