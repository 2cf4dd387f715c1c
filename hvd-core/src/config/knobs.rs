//! The environment variables, one line each: which field they set, and how their values are written.
//!
//! `docs/CONFIGURATION.md` says what each is for; a test compares it with these lists.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::{Config, LogLevel, TransportChoice};

/// A variable that sets a field of [`Config`].
pub struct Knob {
    /// Its name.
    pub name: &'static str,
    /// Horovod's name for it, read where ours is not set.
    pub horovod: Option<&'static str>,
    /// What its value must be, as an error puts it.
    pub expected: &'static str,
    /// Sets the field; `None` if the text is no such value.
    pub set: fn(&mut Config, &str) -> Option<()>,
    /// The field's value as the variable would have it; empty for none.
    pub show: fn(&Config) -> String,
}

/// How the values of one kind are written.
trait Format<T> {
    const EXPECTED: &'static str;
    fn parse(text: &str) -> Option<T>;
    fn show(value: &T) -> String;
}

macro_rules! formats {
    ($($(#[$doc:meta])* $format:ident: $type:ty, $expected:literal, $parse:expr, $show:expr;)*) => {$(
        $(#[$doc])*
        struct $format;

        impl Format<$type> for $format {
            const EXPECTED: &'static str = $expected;
            fn parse(text: &str) -> Option<$type> {
                let parse: fn(&str) -> Option<$type> = $parse;
                parse(text)
            }
            fn show(value: &$type) -> String {
                let show: fn(&$type) -> String = $show;
                show(value)
            }
        }
    )*};
}

formats! {
    Bytes: usize, "a number of bytes", |text| text.parse().ok(), usize::to_string;
    Count: usize, "a whole number", |text| text.parse().ok(), usize::to_string;
    Flag: bool, "0 or 1", |text| flag(text), |&on| u8::from(on).to_string();
    Seconds: Duration, "a number of seconds, 0 or more", |text| seconds(text), |time| time.as_secs_f64().to_string();
    Micros: Duration, "a number of microseconds", |text| text.parse().ok().map(Duration::from_micros),
        |time| time.as_micros().to_string();
    Text: Option<String>, "a text", |text| Some(Some(text.into())), |text| text.clone().unwrap_or_default();
    Address: Option<IpAddr>, "an IP address", |text| text.parse().ok().map(Some), |address| shown(address.as_ref());
    File: Option<PathBuf>, "a path", |text| Some(Some(text.into())),
        |path| shown(path.as_ref().map(|path| path.display()));
    /// Horovod's `DYNAMIC` asks for what we always allow: to start a timeline later.
    Timeline: Option<PathBuf>, "a path, or DYNAMIC", |text| Some((text != "DYNAMIC").then(|| text.into())),
        |path| shown(path.as_ref().map(|path| path.display()));
    Cores: Vec<usize>, "numbers of processors, one for each local rank, such as 0,2,4",
        |text| text.split(',').map(|core| core.trim().parse().ok()).collect(),
        |cores| cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    Transport: TransportChoice, "auto, tcp or mpi", TransportChoice::parse, |choice| choice.name().into();
    Level: LogLevel, "trace, debug, info, warning, error or off", LogLevel::parse, |level| level.name().into();
}

fn flag(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

fn seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.parse().ok()?).ok()
}

fn shown(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

macro_rules! knob {
    ($name:literal, $horovod:expr, $format:ty, $($field:ident).+) => {
        Knob {
            name: $name,
            horovod: $horovod,
            expected: <$format as Format<_>>::EXPECTED,
            set: |config, text| <$format as Format<_>>::parse(text).map(|value| config.$($field).+ = value),
            show: |config| <$format as Format<_>>::show(&config.$($field).+),
        }
    };
}

/// Every variable that sets a field, in the order of `docs/CONFIGURATION.md`.
pub const KNOBS: &[Knob] = &[
    knob!("HVD_FUSION_THRESHOLD", Some("HOROVOD_FUSION_THRESHOLD"), Bytes, fusion_threshold_bytes),
    knob!("HVD_CACHE_CAPACITY", Some("HOROVOD_CACHE_CAPACITY"), Count, cache_capacity),
    knob!("HVD_SEGMENT_BYTES", None, Bytes, segment_bytes),
    knob!("HVD_DOUBLING_LIMIT_BYTES", None, Bytes, doubling_limit_bytes),
    knob!("HVD_HIERARCHICAL_ALLREDUCE", Some("HOROVOD_HIERARCHICAL_ALLREDUCE"), Flag, hierarchical_allreduce),
    knob!("HVD_SHM", None, Flag, shared_memory),
    knob!("HVD_SHM_SLOT_BYTES", None, Bytes, shm_slot_bytes),
    knob!("HVD_SPIN_US", None, Micros, spin),
    knob!("HVD_THREAD_AFFINITY", Some("HOROVOD_THREAD_AFFINITY"), Cores, thread_affinity),
    knob!("HVD_TRANSPORT", None, Transport, transport),
    knob!("HVD_RENDEZVOUS", None, Text, rendezvous),
    knob!("HVD_SECRET", None, Text, secret),
    knob!("HVD_BIND", None, Address, bind),
    knob!("HVD_START_TIMEOUT", Some("HOROVOD_START_TIMEOUT"), Seconds, start_timeout),
    knob!("HVD_PEER_TIMEOUT", None, Seconds, peer_timeout),
    knob!("HVD_STALL_CHECK_DISABLE", Some("HOROVOD_STALL_CHECK_DISABLE"), Flag, stall.disabled),
    knob!("HVD_STALL_CHECK_TIME_SECONDS", Some("HOROVOD_STALL_CHECK_TIME_SECONDS"), Seconds, stall.warn_after),
    knob!("HVD_STALL_SHUTDOWN_TIME_SECONDS", Some("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"), Seconds, stall.fail_after),
    knob!("HVD_TIMELINE", Some("HOROVOD_TIMELINE"), Timeline, timeline),
    knob!("HVD_TIMELINE_MARK_CYCLES", Some("HOROVOD_TIMELINE_MARK_CYCLES"), Flag, timeline_mark_rounds),
    knob!("HVD_AUTOTUNE", Some("HOROVOD_AUTOTUNE"), Flag, autotune.enabled),
    knob!("HVD_AUTOTUNE_LOG", Some("HOROVOD_AUTOTUNE_LOG"), File, autotune.log),
    knob!("HVD_AUTOTUNE_WARMUP_SAMPLES", Some("HOROVOD_AUTOTUNE_WARMUP_SAMPLES"), Count, autotune.warmup_samples),
    knob!("HVD_AUTOTUNE_STEPS_PER_SAMPLE", Some("HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE"), Count, autotune.steps_per_sample),
    knob!("HVD_AUTOTUNE_MAX_SAMPLES", Some("HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES"), Count, autotune.max_samples),
    knob!("HVD_LOG_LEVEL", Some("HOROVOD_LOG_LEVEL"), Level, log_level),
    knob!("HVD_LOG_HIDE_TIME", Some("HOROVOD_LOG_HIDE_TIME"), Flag, log_hide_time),
];

/// Those whose value must be the same on all ranks.
pub const AGREED: &[&str] = &[
    "HVD_FUSION_THRESHOLD",
    "HVD_CACHE_CAPACITY",
    "HVD_SEGMENT_BYTES",
    "HVD_DOUBLING_LIMIT_BYTES",
    "HVD_HIERARCHICAL_ALLREDUCE",
    "HVD_SHM",
    "HVD_TRANSPORT",
    "HVD_PEER_TIMEOUT",
    "HVD_AUTOTUNE",
];

/// Variables of ours that are no field of [`Config`]: this process's place, and where files are.
pub const OTHERS: &[&str] = &[
    "HVD_RANK",
    "HVD_SIZE",
    "HVD_LOCAL_RANK",
    "HVD_LOCAL_SIZE",
    "HVD_CROSS_RANK",
    "HVD_CROSS_SIZE",
    "HVD_JOB_ID",
    "HVD_MPI_PLUGIN",
    "HVD_SSH",
];

/// Variables of Horovod that change nothing here, and why.
pub const IGNORED: &[(&str, &str)] = &[
    ("HOROVOD_CYCLE_TIME", "there is no cycle: an operation starts when the last rank has submitted it"),
    ("HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE", "the tuner searches one setting at a time, without a model"),
    ("HOROVOD_HIERARCHICAL_ALLGATHER", "where the ranks are decides"),
    ("HOROVOD_TORUS_ALLREDUCE", "there is no torus"),
    ("HOROVOD_BATCH_D2D_MEMCOPIES", "tensors on GPUs are staged on the CPU"),
    ("HOROVOD_NUM_NCCL_STREAMS", "NCCL is not used"),
    ("HOROVOD_CPU_OPERATIONS", "see HVD_TRANSPORT"),
    ("HOROVOD_CONTROLLER", "ranks negotiate without a coordinator, over what HVD_TRANSPORT says"),
    ("HOROVOD_CCL_CACHE", "oneCCL is not used"),
    ("HOROVOD_GLOO_IFACE", "Gloo is not used; see HVD_BIND"),
    ("HOROVOD_GLOO_TIMEOUT_SECONDS", "Gloo is not used; see HVD_START_TIMEOUT"),
    ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "Gloo is not used; see HVD_RENDEZVOUS"),
    ("HOROVOD_GLOO_RENDEZVOUS_PORT", "Gloo is not used; see HVD_RENDEZVOUS"),
    ("HOROVOD_ADASUM_MPI_CHUNK_SIZE", "Adasum does not use MPI's operations"),
    ("HOROVOD_DISABLE_GROUP_FUSION", "a group always travels as one"),
    ("HOROVOD_DISABLE_NVTX_RANGES", "there are no NVTX ranges; see HVD_TIMELINE"),
    ("HOROVOD_ENABLE_ASYNC_COMPLETION", "tensors on GPUs are staged on the CPU"),
    ("HOROVOD_DYNAMIC_PROCESS_SETS", "process sets can always be made later"),
    ("HOROVOD_ENABLE_XLA_OPS", "XLA is not used"),
    ("HOROVOD_MPI_THREADS_DISABLE", "one thread talks to MPI"),
    ("HOROVOD_ELASTIC", "there is no elastic membership"),
    ("HOROVOD_ELASTIC_TIMEOUT", "there is no elastic membership"),
    ("HOROVOD_HOSTNAME", "a successful exchange of memory says which ranks share a host"),
    ("HOROVOD_SECRET_KEY", "see HVD_SECRET"),
    ("HOROVOD_RANK", "see HVD_RANK"),
    ("HOROVOD_SIZE", "see HVD_SIZE"),
    ("HOROVOD_LOCAL_RANK", "see HVD_LOCAL_RANK"),
    ("HOROVOD_LOCAL_SIZE", "see HVD_LOCAL_SIZE"),
    ("HOROVOD_CROSS_RANK", "see HVD_CROSS_RANK"),
    ("HOROVOD_CROSS_SIZE", "see HVD_CROSS_SIZE"),
];
