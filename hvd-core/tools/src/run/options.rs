//! What can be set on the command line and in a configuration file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

use super::hosts::{self, Host};

/// The options of a job: flags of the command line, and keys of the configuration file under the same names.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Number of ranks (also -np). Default: all slots of the hosts
    #[arg(short = 'n', long, value_name = "N")]
    pub num_proc: Option<usize>,

    /// Hosts and how many ranks each takes, `host:slots,…`. Default: this host
    #[arg(short = 'H', long, value_name = "HOSTS", conflicts_with = "hostfile")]
    pub hosts: Option<String>,

    /// A file with a line per host, `host slots=N`
    #[arg(long, value_name = "FILE")]
    pub hostfile: Option<PathBuf>,

    /// Port of the hosts' ssh servers
    #[arg(short = 'p', long, value_name = "PORT", help_heading = "Other hosts")]
    pub ssh_port: Option<u16>,

    /// Private key to log in with
    #[arg(short = 'i', long, value_name = "FILE", help_heading = "Other hosts")]
    pub ssh_identity_file: Option<PathBuf>,

    /// What reaches other hosts in the place of `ssh`: words, to which [-p PORT] [-i FILE] HOST COMMAND is added (HVD_SSH)
    #[arg(long, value_name = "COMMAND", help_heading = "Other hosts")]
    pub ssh_command: Option<String>,

    /// Where hvdrun lies on the other hosts. Default: where it lies here
    #[arg(long, value_name = "PATH", help_heading = "Other hosts")]
    pub remote_hvdrun: Option<String>,

    /// The network interface over which ranks of different hosts talk, the same on all. Default: as the routes go
    #[arg(long, visible_alias = "network-interfaces", value_name = "NAME", help_heading = "Other hosts")]
    pub network_interface: Option<String>,

    /// How long hosts and ranks are waited for at the start, in seconds. Default: 30
    #[arg(long, value_name = "SECONDS")]
    pub start_timeout: Option<f64>,

    /// Between asking ranks to end and killing them, in seconds. Default: 5
    #[arg(long, value_name = "SECONDS")]
    pub grace: Option<f64>,

    /// Also keep what each rank prints, in DIR/rank.N/stdout and stderr
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub output_filename: Option<PathBuf>,

    /// Begin each line with rank and stream. Default: on
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Output")]
    pub tag_output: Option<bool>,

    /// Begin each line with the time
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Output")]
    pub prefix_output_with_timestamp: Option<bool>,

    /// Say what is started where, with which variables
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Output")]
    pub verbose: Option<bool>,

    /// Tensors are reduced together up to this size, in MiB (HVD_FUSION_THRESHOLD)
    #[arg(long, value_name = "MIB", help_heading = "Settings of the runtime")]
    pub fusion_threshold_mb: Option<f64>,

    /// How many agreements are remembered (HVD_CACHE_CAPACITY)
    #[arg(long, value_name = "N", help_heading = "Settings of the runtime")]
    pub cache_capacity: Option<usize>,

    /// Remember no agreements
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Settings of the runtime")]
    pub disable_cache: Option<bool>,

    /// Reduce within each host before and after going between hosts (HVD_HIERARCHICAL_ALLREDUCE)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Settings of the runtime")]
    pub hierarchical_allreduce: Option<bool>,

    /// Write a timeline in Chrome's trace format (HVD_TIMELINE)
    #[arg(long, value_name = "FILE", help_heading = "Settings of the runtime")]
    pub timeline_filename: Option<PathBuf>,

    /// Mark the rounds of negotiation in the timeline (HVD_TIMELINE_MARK_CYCLES)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Settings of the runtime")]
    pub timeline_mark_cycles: Option<bool>,

    /// Find the best settings while running (HVD_AUTOTUNE)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Settings of the runtime")]
    pub autotune: Option<bool>,

    /// Where the tuner writes what it tried, as CSV (HVD_AUTOTUNE_LOG)
    #[arg(long, value_name = "FILE", help_heading = "Settings of the runtime")]
    pub autotune_log_file: Option<PathBuf>,

    /// Samples that the tuner discards at first (HVD_AUTOTUNE_WARMUP_SAMPLES)
    #[arg(long, value_name = "N", help_heading = "Settings of the runtime")]
    pub autotune_warmup_samples: Option<usize>,

    /// Steps of one of the tuner's samples (HVD_AUTOTUNE_STEPS_PER_SAMPLE)
    #[arg(long, value_name = "N", help_heading = "Settings of the runtime")]
    pub autotune_steps_per_sample: Option<usize>,

    /// Samples that the tuner takes at most (HVD_AUTOTUNE_MAX_SAMPLES)
    #[arg(
        long,
        visible_alias = "autotune-bayes-opt-max-samples",
        value_name = "N",
        help_heading = "Settings of the runtime"
    )]
    pub autotune_max_samples: Option<usize>,

    /// Warn of tensors that some ranks do not submit. Default: on (HVD_STALL_CHECK_DISABLE)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Settings of the runtime")]
    pub stall_check: Option<bool>,

    /// When to warn, in seconds (HVD_STALL_CHECK_TIME_SECONDS)
    #[arg(long, value_name = "SECONDS", help_heading = "Settings of the runtime")]
    pub stall_check_warning_time_seconds: Option<f64>,

    /// When to end the job, in seconds; 0: never (HVD_STALL_SHUTDOWN_TIME_SECONDS)
    #[arg(long, value_name = "SECONDS", help_heading = "Settings of the runtime")]
    pub stall_check_shutdown_time_seconds: Option<f64>,

    /// The core of each local rank's background thread, `0,1,…` (HVD_THREAD_AFFINITY)
    #[arg(long, value_name = "CORES", help_heading = "Settings of the runtime")]
    pub thread_affinity: Option<String>,

    /// How much the runtime logs: trace, debug, info, warning, error (HVD_LOG_LEVEL)
    #[arg(long, value_name = "LEVEL", help_heading = "Settings of the runtime")]
    pub log_level: Option<String>,

    /// Leave the time out of the log (HVD_LOG_HIDE_TIME)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", help_heading = "Settings of the runtime")]
    pub log_hide_timestamp: Option<bool>,
}

impl Options {
    /// These options, and those of the file for what they leave open.
    ///
    /// # Errors
    /// For a file that cannot be read, an unknown key or a value of another type; the text names file, line and key.
    pub fn over_file(self, path: &Path) -> Result<Options> {
        let about = || format!("configuration file {}", path.display());
        let text = std::fs::read_to_string(path).with_context(about)?;
        let file = match text.trim().is_empty() {
            true => Options::default(),
            false => serde_yaml::from_str(&text).with_context(about)?,
        };
        let mut merged = mapping(&file)?;
        let own = mapping(&self)?;
        if own.contains_key("hosts") || own.contains_key("hostfile") {
            merged.remove("hosts");
            merged.remove("hostfile");
        }
        merged.extend(own);
        Ok(serde_yaml::from_value(Value::Mapping(merged))?)
    }

    /// The hosts that were named; none: this one.
    ///
    /// # Errors
    /// For what names no hosts.
    pub fn hosts(&self) -> Result<Vec<Host>> {
        match (&self.hosts, &self.hostfile) {
            (Some(_), Some(_)) => anyhow::bail!("both hosts and hostfile are given; give one of them"),
            (Some(list), None) => hosts::parse_list(list).context("the list of hosts"),
            (None, Some(path)) => hosts::read_file(path),
            (None, None) => Ok(Vec::new()),
        }
    }

    /// How long hosts are waited for.
    ///
    /// # Errors
    /// For what is no positive time.
    pub fn start_timeout(&self) -> Result<Duration> {
        let timeout = seconds("start-timeout", self.start_timeout, 30.0)?;
        ensure!(
            !timeout.is_zero(),
            "--start-timeout is 0; expected the seconds in which the hosts and the ranks must come together"
        );
        Ok(timeout)
    }

    /// Between asking ranks to end and killing them.
    ///
    /// # Errors
    /// For what is no time.
    pub fn grace(&self) -> Result<Duration> {
        seconds("grace", self.grace, 5.0)
    }

    /// The settings of the runtime as environment variables of the ranks.
    ///
    /// # Errors
    /// For a value that cannot be.
    pub fn variables(&self) -> Result<Vec<(&'static str, String)>> {
        let fusion = self.fusion_threshold_mb.map(mebibytes).transpose()?;
        let cache = if self.disable_cache == Some(true) { Some(0) } else { self.cache_capacity };
        let settings = [
            ("HVD_START_TIMEOUT", text(&self.start_timeout)),
            ("HVD_FUSION_THRESHOLD", text(&fusion)),
            ("HVD_CACHE_CAPACITY", text(&cache)),
            ("HVD_HIERARCHICAL_ALLREDUCE", switch(self.hierarchical_allreduce)),
            ("HVD_TIMELINE", self.timeline()?),
            ("HVD_TIMELINE_MARK_CYCLES", switch(self.timeline_mark_cycles)),
            ("HVD_AUTOTUNE", switch(self.autotune)),
            ("HVD_AUTOTUNE_LOG", path(&self.autotune_log_file)?),
            ("HVD_AUTOTUNE_WARMUP_SAMPLES", text(&self.autotune_warmup_samples)),
            ("HVD_AUTOTUNE_STEPS_PER_SAMPLE", text(&self.autotune_steps_per_sample)),
            ("HVD_AUTOTUNE_MAX_SAMPLES", text(&self.autotune_max_samples)),
            ("HVD_STALL_CHECK_DISABLE", switch(self.stall_check.map(|on| !on))),
            ("HVD_STALL_CHECK_TIME_SECONDS", text(&self.stall_check_warning_time_seconds)),
            ("HVD_STALL_SHUTDOWN_TIME_SECONDS", text(&self.stall_check_shutdown_time_seconds)),
            ("HVD_THREAD_AFFINITY", self.thread_affinity.clone()),
            ("HVD_LOG_LEVEL", self.log_level.clone()),
            ("HVD_LOG_HIDE_TIME", switch(self.log_hide_timestamp)),
        ];
        Ok(settings.into_iter().filter_map(|(name, value)| Some((name, value?))).collect())
    }

    /// Horovod's `DYNAMIC` is no file.
    fn timeline(&self) -> Result<Option<String>> {
        match &self.timeline_filename {
            Some(name) if name.as_os_str() == "DYNAMIC" => Ok(Some("DYNAMIC".into())),
            file => path(file),
        }
    }
}

/// What is set, by name.
fn mapping(options: &Options) -> Result<Mapping> {
    match serde_yaml::to_value(options)? {
        Value::Mapping(all) => Ok(all.into_iter().filter(|(_, value)| !value.is_null()).collect()),
        _ => Ok(Mapping::new()),
    }
}

fn text<T: ToString>(value: &Option<T>) -> Option<String> {
    value.as_ref().map(ToString::to_string)
}

fn switch(on: Option<bool>) -> Option<String> {
    on.map(|on| u8::from(on).to_string())
}

fn path(path: &Option<PathBuf>) -> Result<Option<String>> {
    let text = |path: &PathBuf| {
        let path = std::path::absolute(path)?;
        path.to_str().map(str::to_string).with_context(|| format!("{} is not UTF-8", path.display()))
    };
    path.as_ref().map(text).transpose()
}

fn mebibytes(value: f64) -> Result<usize> {
    ensure!((0.0..=1e6).contains(&value), "--fusion-threshold-mb is {value}; expected 0 to 1000000 MiB");
    Ok((value * f64::from(1 << 20)) as usize)
}

fn seconds(name: &str, value: Option<f64>, default: f64) -> Result<Duration> {
    let value = value.unwrap_or(default);
    Duration::try_from_secs_f64(value).with_context(|| format!("--{name} is {value}; expected a number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.yaml");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let (_folder, path) = file("num_proc: 4\nhostfile: nodes\nautotune: true\nfusion_threshold_mb: 32\n");
        let own = Options { num_proc: Some(2), hosts: Some("a:2".into()), autotune: Some(false), ..Options::default() };
        let expected = Options { fusion_threshold_mb: Some(32.0), ..own.clone() };
        assert_eq!(own.over_file(&path).unwrap(), expected);
    }

    #[test]
    fn an_empty_file_sets_nothing() {
        let (_folder, path) = file("\n# nothing\n");
        assert_eq!(Options::default().over_file(&path).unwrap(), Options::default());
    }

    #[test]
    fn files_that_are_wrong_are_refused_by_file_and_key() {
        for (text, expected) in [
            ("num_procs: 4", "num_procs"),
            ("num_proc: many", "num_proc"),
            ("verbose: 3", "verbose"),
            ("[1]", "expected"),
            ("num_proc: 1\nverbose: [", "line"),
        ] {
            let (_folder, path) = file(text);
            let error = format!("{:#}", Options::default().over_file(&path).expect_err(text));
            assert!(error.contains(expected) && error.contains("job.yaml"), "{text}: {error}");
        }
        let error = format!("{:#}", Options::default().over_file(Path::new("no/such.yaml")).unwrap_err());
        assert!(error.contains("no/such.yaml"), "{error}");
    }

    #[test]
    fn settings_become_the_variables_of_the_runtime() {
        let options = Options {
            fusion_threshold_mb: Some(0.5),
            cache_capacity: Some(7),
            disable_cache: Some(true),
            stall_check: Some(false),
            start_timeout: Some(2.5),
            ..Options::default()
        };
        let expected = [
            ("HVD_START_TIMEOUT", "2.5"),
            ("HVD_FUSION_THRESHOLD", "524288"),
            ("HVD_CACHE_CAPACITY", "0"),
            ("HVD_STALL_CHECK_DISABLE", "1"),
        ];
        assert_eq!(options.variables().unwrap(), expected.map(|(name, value)| (name, value.to_string())));
        let wrong = Options { fusion_threshold_mb: Some(f64::NAN), ..Options::default() };
        assert!(wrong.variables().is_err());
        assert!(Options { grace: Some(-1.0), ..Options::default() }.grace().is_err());
    }
}
