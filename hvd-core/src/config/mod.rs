//! The runtime's settings, typed, and the environment variables that set them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::topology::Vars;

mod knobs;

pub use knobs::{AGREED, IGNORED, KNOBS, Knob, OTHERS};

/// Which transport moves the bytes between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportChoice {
    /// TCP; MPI where the ranks are on several hosts and nothing but MPI can introduce them to each other.
    Auto,
    /// TCP.
    Tcp,
    /// The MPI plugin.
    Mpi,
}

impl TransportChoice {
    fn parse(text: &str) -> Option<Self> {
        [TransportChoice::Auto, TransportChoice::Tcp, TransportChoice::Mpi].into_iter().find(|it| it.name() == text)
    }

    fn name(self) -> &'static str {
        match self {
            TransportChoice::Auto => "auto",
            TransportChoice::Tcp => "tcp",
            TransportChoice::Mpi => "mpi",
        }
    }
}

/// From which level on messages are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)] // The usual levels.
pub enum LogLevel {
    Trace,
    Debug,
    Info,
    Warning,
    Error,
    Off,
}

impl LogLevel {
    /// Horovod's `fatal` is `error` here.
    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "trace" => Some(LogLevel::Trace),
            "debug" => Some(LogLevel::Debug),
            "info" => Some(LogLevel::Info),
            "warning" | "warn" => Some(LogLevel::Warning),
            "error" | "fatal" => Some(LogLevel::Error),
            "off" => Some(LogLevel::Off),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            LogLevel::Trace => "trace",
            LogLevel::Debug => "debug",
            LogLevel::Info => "info",
            LogLevel::Warning => "warning",
            LogLevel::Error => "error",
            LogLevel::Off => "off",
        }
    }
}

/// When a tensor that some rank has not submitted is complained of.
#[derive(Clone, Debug, PartialEq)]
pub struct Stall {
    /// Never. `HVD_STALL_CHECK_DISABLE`; default 0.
    pub disabled: bool,
    /// After this time a warning names the tensor and the ranks that lack it. `HVD_STALL_CHECK_TIME_SECONDS`; default 60.
    pub warn_after: Duration,
    /// After this time the world fails; 0 for never. `HVD_STALL_SHUTDOWN_TIME_SECONDS`; default 0.
    pub fail_after: Duration,
}

/// The tuner: tries settings while the program runs, and keeps the best.
#[derive(Clone, Debug, PartialEq)]
pub struct Autotune {
    /// Whether it runs. `HVD_AUTOTUNE`; default 0.
    pub enabled: bool,
    /// Where rank 0 writes what was tried, as CSV. `HVD_AUTOTUNE_LOG`.
    pub log: Option<PathBuf>,
    /// How many samples are thrown away at first. `HVD_AUTOTUNE_WARMUP_SAMPLES`; default 3.
    pub warmup_samples: usize,
    /// A sample ends when some tensor has been reduced this often. `HVD_AUTOTUNE_STEPS_PER_SAMPLE`; default 10.
    pub steps_per_sample: usize,
    /// How many samples are taken at most. `HVD_AUTOTUNE_MAX_SAMPLES`; default 120.
    pub max_samples: usize,
    /// Variables whose settings stay as they are: those that were set.
    pub fixed: BTreeSet<&'static str>,
}

/// Every setting of the runtime, with its default in [`Config::default`].
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Small tensors that are ready together are reduced together up to this size. 0 switches fusion off.
    /// `HVD_FUSION_THRESHOLD`, bytes; default 128 MiB.
    pub fusion_threshold_bytes: usize,
    /// How many agreements are remembered, so that a repeated tensor costs one bit. 0 switches the cache off.
    /// `HVD_CACHE_CAPACITY`; default 1024.
    pub cache_capacity: usize,
    /// Large messages travel in pieces of this size. `HVD_SEGMENT_BYTES`; default 256 KiB.
    pub segment_bytes: usize,
    /// Tensors up to this size are reduced by recursive doubling, larger ones in a ring. `HVD_DOUBLING_LIMIT_BYTES`;
    /// default 16 KiB.
    pub doubling_limit_bytes: usize,
    /// Whether ranks on several hosts reduce within each host before and after they go between hosts.
    /// `HVD_HIERARCHICAL_ALLREDUCE` (0 or 1); default 1.
    pub hierarchical_allreduce: bool,
    /// Whether ranks of one host use shared memory. `HVD_SHM` (0 or 1); default 1.
    pub shared_memory: bool,
    /// Size of one piece staged in shared memory. `HVD_SHM_SLOT_BYTES`; default 128 KiB.
    pub shm_slot_bytes: usize,
    /// How long a waiting thread spins before it sleeps; the engine's own thread spins a quarter of that. Where a host has more
    /// ranks than processors both let others run between two looks, for 10 times as long. `HVD_SPIN_US`, microseconds; default
    /// 200, several times what it costs to be woken.
    pub spin: Duration,
    /// The processor that the engine's thread of each local rank is bound to; empty for none.
    /// `HVD_THREAD_AFFINITY`, such as `0,2,4`.
    pub thread_affinity: Vec<usize>,
    /// What moves the bytes. `HVD_TRANSPORT` (auto, tcp, mpi); default auto.
    pub transport: TransportChoice,
    /// Where rank 0 waits for the others, `host:port`. Not needed on one host. `HVD_RENDEZVOUS`.
    pub rendezvous: Option<String>,
    /// What every rank of the job knows and no stranger does, at least 16 bytes. Needed with `HVD_RENDEZVOUS`.
    /// `HVD_SECRET`.
    pub secret: Option<String>,
    /// The address that this rank listens on; anything but loopback needs a secret. `HVD_BIND`; default: where
    /// the way to the meeting point begins, 127.0.0.1 where that is no address.
    pub bind: Option<IpAddr>,
    /// How long the ranks wait for each other at the start. `HVD_START_TIMEOUT`, seconds; default 30.
    pub start_timeout: Duration,
    /// How long a rank may give no sign of life before the world is lost; a rank that lives gives them also while it
    /// computes. 0: for ever, for debuggers. `HVD_PEER_TIMEOUT`, seconds; default 30.
    pub peer_timeout: Duration,
    /// The stall inspector.
    pub stall: Stall,
    /// Where the timeline is written from the start on. `HVD_TIMELINE`.
    pub timeline: Option<PathBuf>,
    /// Whether the timeline shows the rounds of negotiation. `HVD_TIMELINE_MARK_CYCLES` (0 or 1); default 0.
    pub timeline_mark_rounds: bool,
    /// The tuner.
    pub autotune: Autotune,
    /// What is logged to stderr where the program does not log by itself. `HVD_LOG_LEVEL`; default warning.
    pub log_level: LogLevel,
    /// Whether these lines lack the time. `HVD_LOG_HIDE_TIME` (0 or 1); default 0.
    pub log_hide_time: bool,
}

impl Default for Stall {
    fn default() -> Self {
        Stall { disabled: false, warn_after: Duration::from_secs(60), fail_after: Duration::ZERO }
    }
}

impl Default for Autotune {
    fn default() -> Self {
        Autotune {
            enabled: false,
            log: None,
            warmup_samples: 3,
            steps_per_sample: 10,
            max_samples: 120,
            fixed: BTreeSet::new(),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            fusion_threshold_bytes: 128 << 20,
            cache_capacity: 1024,
            segment_bytes: 256 << 10,
            doubling_limit_bytes: 16 << 10,
            hierarchical_allreduce: true,
            shared_memory: true,
            shm_slot_bytes: 128 << 10,
            spin: Duration::from_micros(200),
            thread_affinity: Vec::new(),
            transport: TransportChoice::Auto,
            rendezvous: None,
            secret: None,
            bind: None,
            start_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(30),
            stall: Stall::default(),
            timeline: None,
            timeline_mark_rounds: false,
            autotune: Autotune::default(),
            log_level: LogLevel::Warning,
            log_hide_time: false,
        }
    }
}

impl Config {
    /// Reads the environment of this process.
    pub fn from_env() -> Result<Self> {
        Config::from_vars(&environment())
    }

    /// The defaults, changed by what `vars` set. `HVD_*` wins over `HOROVOD_*`; an empty value is none.
    ///
    /// # Errors
    /// [`Error::Config`] that names the variable, its value, and what was expected.
    pub fn from_vars(vars: &Vars) -> Result<Self> {
        let mut config = Config::default();
        for knob in KNOBS {
            let Some((name, value)) = lookup(vars, knob) else { continue };
            (knob.set)(&mut config, value.trim()).ok_or_else(|| wrong(name, value, knob.expected))?;
            config.autotune.fixed.insert(knob.name);
        }
        config.validated()
    }

    fn validated(self) -> Result<Self> {
        if self.segment_bytes == 0 {
            return Err(wrong("HVD_SEGMENT_BYTES", "0", "at least 1 byte"));
        }
        if !(4096..=1 << 30).contains(&self.shm_slot_bytes) {
            return Err(wrong("HVD_SHM_SLOT_BYTES", &self.shm_slot_bytes.to_string(), "4096 bytes to 1 GiB"));
        }
        if self.autotune.steps_per_sample == 0 {
            return Err(wrong("HVD_AUTOTUNE_STEPS_PER_SAMPLE", "0", "at least 1"));
        }
        if self.rendezvous.is_some() && self.secret.is_none() {
            let text = "HVD_RENDEZVOUS is set, but HVD_SECRET is not; give all ranks the same secret, for instance \
                        HVD_SECRET=$(openssl rand -hex 32)";
            return Err(Error::Config(text.into()));
        }
        if self.bind.is_some_and(|address| !address.is_loopback()) && self.secret.is_none() {
            let text = "HVD_BIND is not a loopback address and HVD_SECRET is not set; listening beyond this host needs \
                        a secret that all ranks know";
            return Err(Error::Config(text.into()));
        }
        Ok(self)
    }
}

/// What to tell a user whose variables change nothing: misspelt ones of ours, and Horovod's that have no meaning here.
pub fn remarks(vars: &Vars) -> Vec<String> {
    let known = |name: &str| KNOBS.iter().any(|knob| knob.name == name) || OTHERS.contains(&name);
    let misspelt = |name: &str| format!("{name} is set, but is no setting; docs/CONFIGURATION.md lists them all");
    let ours = vars.keys().filter(|name| name.starts_with("HVD_") && !name.starts_with("HVD_TEST_"));
    let ours = ours.filter(|name| !known(name)).map(|name| misspelt(name));
    let ignored = IGNORED.iter().filter(|(name, _)| vars.contains_key(*name));
    ours.chain(ignored.map(|(name, why)| format!("{name} changes nothing: {why}"))).collect()
}

/// The variables of this process that are text.
pub(crate) fn environment() -> Vars {
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).collect()
}

fn lookup<'a>(vars: &'a Vars, knob: &Knob) -> Option<(&'static str, &'a str)> {
    let names = std::iter::once(knob.name).chain(knob.horovod);
    names.filter_map(|name| Some((name, vars.get(name)?.as_str()))).find(|(_, value)| !value.is_empty())
}

fn wrong(name: &str, value: &str, expected: &str) -> Error {
    Error::Config(format!("{name} is `{value}`; expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Result<Config> {
        Config::from_vars(&pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    #[test]
    fn nothing_set_gives_the_defaults() {
        assert_eq!(config(&[]).unwrap(), Config::default());
    }

    #[test]
    fn our_names_win_over_horovods() {
        let both = [("HVD_FUSION_THRESHOLD", "7"), ("HOROVOD_FUSION_THRESHOLD", "8")];
        assert_eq!(config(&both).unwrap().fusion_threshold_bytes, 7);
        assert_eq!(config(&both[1..]).unwrap().fusion_threshold_bytes, 8);
    }

    #[test]
    fn every_setting_is_read() {
        let config = config(&[
            ("HVD_SHM", "0"),
            ("HVD_TRANSPORT", "tcp"),
            ("HVD_RENDEZVOUS", "h:1"),
            ("HVD_SECRET", "s"),
            ("HVD_BIND", "0.0.0.0"),
            ("HVD_START_TIMEOUT", "1.5"),
            ("HVD_PEER_TIMEOUT", "2.5"),
            ("HVD_SPIN_US", "0"),
        ])
        .unwrap();
        assert_eq!(config.autotune.fixed.len(), 8);
        assert!(!config.shared_memory);
        assert_eq!(config.transport, TransportChoice::Tcp);
        assert_eq!(config.start_timeout, Duration::from_millis(1500));
        assert_eq!(config.peer_timeout, Duration::from_millis(2500));
        assert_eq!(config.spin, Duration::ZERO);
        assert_eq!(config.bind, Some(IpAddr::from([0, 0, 0, 0])));
    }

    #[test]
    fn what_a_setting_shows_is_how_it_is_written() {
        for knob in KNOBS {
            let text = (knob.show)(&Config::default());
            let mut config = Config::default();
            if !text.is_empty() {
                (knob.set)(&mut config, &text).expect(knob.name);
            }
            assert_eq!(config, Config::default(), "{}", knob.name);
        }
        let affinity = config(&[("HVD_THREAD_AFFINITY", "3, 1")]).unwrap();
        assert_eq!(affinity.thread_affinity, [3, 1]);
        assert_eq!(config(&[("HOROVOD_TIMELINE", "DYNAMIC")]).unwrap().timeline, None);
    }

    #[test]
    fn what_changes_nothing_is_remarked_on() {
        let names = ["HVD_FUSION_TRESHOLD", "HOROVOD_CYCLE_TIME", "HVD_SHM", "HVD_RANK", "HOROVOD_CACHE_CAPACITY"];
        let remarks = remarks(&names.map(|name| (name.to_string(), "1".to_string())).into());
        assert_eq!(remarks.len(), 2, "{remarks:?}");
        assert!(remarks[0].contains("HVD_FUSION_TRESHOLD") && remarks[1].contains("CYCLE_TIME"), "{remarks:?}");
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (name, value) in [
            ("HVD_FUSION_THRESHOLD", "-1"),
            ("HOROVOD_CACHE_CAPACITY", "many"),
            ("HVD_SHM", "yes"),
            ("HVD_TRANSPORT", "pigeon"),
            ("HVD_BIND", "here"),
            ("HVD_START_TIMEOUT", "-3"),
            ("HVD_PEER_TIMEOUT", "soon"),
            ("HVD_SEGMENT_BYTES", "0"),
            ("HVD_THREAD_AFFINITY", "0,x"),
            ("HVD_STALL_CHECK_TIME_SECONDS", "-1"),
            ("HVD_AUTOTUNE_STEPS_PER_SAMPLE", "0"),
            ("HVD_LOG_LEVEL", "loud"),
            ("HVD_SHM_SLOT_BYTES", "1"),
            ("HVD_SHM_SLOT_BYTES", "99999999999"),
            ("HVD_RENDEZVOUS", "host:1"),
        ] {
            let error = config(&[(name, value)]).expect_err(name).to_string();
            assert!(error.contains(name.trim_start_matches("HOROVOD_")), "{error}");
        }
        assert!(config(&[("HVD_BIND", "0.0.0.0")]).expect_err("no secret").to_string().contains("HVD_SECRET"));
    }
}
