//! The runtime's settings, typed, and the environment variables that set them.

use std::net::IpAddr;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::topology::Vars;

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

/// Every setting of the runtime, with its default in [`Config::default`].
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Small tensors that are ready together are reduced together up to this size. 0 switches fusion off.
    /// `HVD_FUSION_THRESHOLD` (`HOROVOD_FUSION_THRESHOLD`), bytes; default 128 MiB.
    pub fusion_threshold_bytes: usize,
    /// How many agreements are remembered, so that a repeated tensor costs one bit. 0 switches the cache off.
    /// `HVD_CACHE_CAPACITY` (`HOROVOD_CACHE_CAPACITY`); default 1024.
    pub cache_capacity: usize,
    /// Large messages travel in pieces of this size. `HVD_SEGMENT_BYTES`; default 512 KiB.
    pub segment_bytes: usize,
    /// Tensors up to this size are reduced by recursive doubling, larger ones in a ring. `HVD_DOUBLING_LIMIT_BYTES`;
    /// default 16 KiB.
    pub doubling_limit_bytes: usize,
    /// Whether ranks of one host use shared memory. `HVD_SHM` (0 or 1); default 1.
    pub shared_memory: bool,
    /// Size of one piece staged in shared memory. `HVD_SHM_SLOT_BYTES`; default 128 KiB.
    pub shm_slot_bytes: usize,
    /// What moves the bytes. `HVD_TRANSPORT` (auto, tcp, mpi); default auto.
    pub transport: TransportChoice,
    /// Where rank 0 waits for the others, `host:port`. Not needed on one host. `HVD_RENDEZVOUS`.
    pub rendezvous: Option<String>,
    /// What every rank of the job knows and no stranger does, at least 16 bytes. Needed with `HVD_RENDEZVOUS`.
    /// `HVD_SECRET`.
    pub secret: Option<String>,
    /// The address that this rank listens on; anything but loopback needs a secret. `HVD_BIND`; default 127.0.0.1.
    pub bind: Option<IpAddr>,
    /// How long the ranks wait for each other at the start. `HVD_START_TIMEOUT` (`HOROVOD_START_TIMEOUT`), seconds;
    /// default 30.
    pub start_timeout: Duration,
    /// How long a waiting thread spins before it sleeps. `HVD_SPIN_US`, microseconds; default 50.
    pub spin: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            fusion_threshold_bytes: 128 << 20,
            cache_capacity: 1024,
            segment_bytes: 512 << 10,
            doubling_limit_bytes: 16 << 10,
            shared_memory: true,
            shm_slot_bytes: 128 << 10,
            transport: TransportChoice::Auto,
            rendezvous: None,
            secret: None,
            bind: None,
            start_timeout: Duration::from_secs(30),
            spin: Duration::from_micros(50),
        }
    }
}

impl Config {
    /// Reads the environment of this process.
    pub fn from_env() -> Result<Self> {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Config::from_vars(&std::env::vars_os().filter_map(text).collect())
    }

    /// The defaults, changed by what `vars` set. `HVD_*` wins over `HOROVOD_*`.
    ///
    /// # Errors
    /// [`Error::Config`] that names the variable, its value, and what was expected.
    pub fn from_vars(vars: &Vars) -> Result<Self> {
        let mut config = Config::default();
        read(vars, &["HVD_FUSION_THRESHOLD", "HOROVOD_FUSION_THRESHOLD"], BYTES, &mut config.fusion_threshold_bytes)?;
        read(vars, &["HVD_CACHE_CAPACITY", "HOROVOD_CACHE_CAPACITY"], "a number", &mut config.cache_capacity)?;
        read(vars, &["HVD_SEGMENT_BYTES"], BYTES, &mut config.segment_bytes)?;
        read(vars, &["HVD_DOUBLING_LIMIT_BYTES"], BYTES, &mut config.doubling_limit_bytes)?;
        read(vars, &["HVD_SHM_SLOT_BYTES"], BYTES, &mut config.shm_slot_bytes)?;
        let mut shared_memory = u8::from(config.shared_memory);
        read(vars, &["HVD_SHM"], "0 or 1", &mut shared_memory)?;
        config.shared_memory = shared_memory != 0;
        config.transport = transport(vars)?;
        config.rendezvous = lookup(vars, &["HVD_RENDEZVOUS"]).map(|(_, value)| value.to_string());
        config.secret = lookup(vars, &["HVD_SECRET"]).map(|(_, value)| value.to_string());
        if let Some((name, value)) = lookup(vars, &["HVD_BIND"]) {
            config.bind = Some(value.parse().map_err(|_| wrong(name, value, "an IP address"))?);
        }
        let mut seconds = config.start_timeout.as_secs_f64();
        read(vars, &["HVD_START_TIMEOUT", "HOROVOD_START_TIMEOUT"], "seconds", &mut seconds)?;
        config.start_timeout = Duration::try_from_secs_f64(seconds)
            .map_err(|_| wrong("HVD_START_TIMEOUT", &seconds.to_string(), "a positive number of seconds"))?;
        let mut spin_us = config.spin.as_micros() as u64;
        read(vars, &["HVD_SPIN_US"], "microseconds", &mut spin_us)?;
        config.spin = Duration::from_micros(spin_us);
        config.validated()
    }

    fn validated(self) -> Result<Self> {
        if self.segment_bytes == 0 {
            return Err(wrong("HVD_SEGMENT_BYTES", "0", "at least 1 byte"));
        }
        if self.shm_slot_bytes < 4096 {
            return Err(wrong("HVD_SHM_SLOT_BYTES", &self.shm_slot_bytes.to_string(), "at least 4096 bytes"));
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

const BYTES: &str = "a number of bytes";

fn lookup<'a>(vars: &'a Vars, names: &[&'a str]) -> Option<(&'a str, &'a str)> {
    let set = |name: &&'a str| vars.get(*name).filter(|value| !value.is_empty()).map(|value| (*name, value.as_str()));
    names.iter().find_map(set)
}

fn read<T: std::str::FromStr>(vars: &Vars, names: &[&str], expected: &str, into: &mut T) -> Result<()> {
    if let Some((name, value)) = lookup(vars, names) {
        *into = value.trim().parse().map_err(|_| wrong(name, value, expected))?;
    }
    Ok(())
}

fn transport(vars: &Vars) -> Result<TransportChoice> {
    match lookup(vars, &["HVD_TRANSPORT"]) {
        None | Some((_, "auto")) => Ok(TransportChoice::Auto),
        Some((_, "tcp")) => Ok(TransportChoice::Tcp),
        Some((_, "mpi")) => Ok(TransportChoice::Mpi),
        Some((name, value)) => Err(wrong(name, value, "auto, tcp or mpi")),
    }
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
            ("HVD_SPIN_US", "0"),
        ])
        .unwrap();
        assert!(!config.shared_memory);
        assert_eq!(config.transport, TransportChoice::Tcp);
        assert_eq!(config.start_timeout, Duration::from_millis(1500));
        assert_eq!(config.spin, Duration::ZERO);
        assert_eq!(config.bind, Some(IpAddr::from([0, 0, 0, 0])));
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
            ("HVD_SEGMENT_BYTES", "0"),
            ("HVD_SHM_SLOT_BYTES", "1"),
            ("HVD_RENDEZVOUS", "host:1"),
        ] {
            let error = config(&[(name, value)]).expect_err(name).to_string();
            assert!(error.contains(name.trim_start_matches("HOROVOD_")), "{error}");
        }
        assert!(config(&[("HVD_BIND", "0.0.0.0")]).expect_err("no secret").to_string().contains("HVD_SECRET"));
    }
}
