//! What the ranks find in their environment.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use anyhow::{Context, Result};

use super::message::Variable;

/// Variables that belong to a host or a login and are not passed on to other hosts, besides [`HOST_PREFIXES`].
const HOST_VARIABLES: [&str; 20] = [
    "_",
    "DISPLAY",
    "HOME",
    "HOST",
    "HOSTNAME",
    "LOGNAME",
    "LS_COLORS",
    "MAIL",
    "OLDPWD",
    "PS1",
    "PWD",
    "SHELL",
    "SHLVL",
    "TEMP",
    "TERM",
    "TMP",
    "TMPDIR",
    "USER",
    "WINDOWID",
    "XAUTHORITY",
];

/// What the names of further such variables begin with.
const HOST_PREFIXES: [&str; 5] = ["BASH_FUNC_", "DBUS_", "SSH_", "SYSTEMD_", "XDG_"];

/// What hvdrun decides: ranks must not inherit where another job meets.
pub const DECIDED: [&str; 3] = ["HVD_BIND", "HVD_RENDEZVOUS", "HVD_SECRET"];

/// This process's environment as far as it means something on other hosts.
pub fn portable() -> Vec<Variable> {
    let portable = std::env::vars_os().filter(|(name, _)| is_portable(&name.to_string_lossy()));
    portable.map(|(name, value)| variable(name, value)).collect()
}

fn is_portable(name: &str) -> bool {
    !HOST_VARIABLES.contains(&name) && !HOST_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// A variable as it travels.
pub fn variable(name: impl Into<OsString>, value: impl Into<OsString>) -> Variable {
    (name.into().into_vec(), value.into().into_vec())
}

/// What the ranks of this job share and nobody else knows: a name for the job, and a secret of 32 bytes in hex digits.
///
/// # Errors
/// If the system has no random bytes.
pub fn identity() -> Result<[Variable; 2]> {
    let (mut name, mut secret) = ([0; 8], [0; 32]);
    getrandom::fill(&mut name).and_then(|()| getrandom::fill(&mut secret)).ok().context("no random bytes")?;
    let job = format!("hvdrun-{}", hex(&name));
    Ok([variable("HVD_JOB_ID", job), variable("HVD_SECRET", hex(&secret))])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_a_host_stay_there() {
        assert!(["PATH", "LD_LIBRARY_PATH", "HVD_SHM", "MY_HOME"].iter().all(|name| is_portable(name)));
        assert!(!["HOME", "SSH_CONNECTION", "XDG_RUNTIME_DIR", "TMPDIR"].iter().any(|name| is_portable(name)));
    }

    #[test]
    fn no_two_jobs_share_a_name_or_a_secret() {
        let ([one, own], [other, theirs]) = (identity().unwrap(), identity().unwrap());
        assert!(one.1 != other.1 && own.1 != theirs.1);
        assert_eq!(own.1.len(), 64);
    }
}
