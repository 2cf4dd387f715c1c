//! Which hosts there are, and how many ranks each takes.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// A host and its room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Name or address, with `user@` before it if the user wrote that: what `ssh` is given.
    pub name: String,
    /// How many ranks it takes.
    pub slots: usize,
}

impl Host {
    /// This host, with room for so many ranks.
    pub fn here(slots: usize) -> Host {
        Host { name: "localhost".into(), slots }
    }

    /// Whether the name means the host that we run on, by its spelling.
    pub fn is_here(&self) -> bool {
        let own = rustix::system::uname();
        let own = own.nodename().to_string_lossy();
        let short = own.split('.').next().unwrap_or(&own);
        ["localhost", "127.0.0.1", "::1", &own, short].contains(&self.name.as_str())
    }

    /// What another host resolves to this one's address: the name without `user@`, and our own name for `localhost`.
    pub fn address_elsewhere(&self) -> String {
        if self.is_here() {
            return rustix::system::uname().nodename().to_string_lossy().into_owned();
        }
        self.name.rsplit_once('@').map_or(&*self.name, |(_, host)| host).into()
    }
}

/// Reads `host:slots,…`; a host without a number takes one rank, and slots of one host add up.
///
/// # Errors
/// For what is no such list; the text names the entry.
pub fn parse_list(text: &str) -> Result<Vec<Host>> {
    added_up(text.split(',').map(|entry| parse_entry(entry.trim())).collect::<Result<_>>()?)
}

/// Reads a host file: a line per host, `host`, `host:2` or `host slots=2`; `#` begins a comment.
///
/// # Errors
/// For a file that cannot be read or a line that cannot be understood; the text names both.
pub fn read_file(path: &Path) -> Result<Vec<Host>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the host file {}", path.display()))?;
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.split('#').next().unwrap_or("").trim()));
    let host = |(at, line): (usize, &str)| parse_line(line).with_context(|| format!("{}, line {at}", path.display()));
    let hosts = lines.filter(|(_, line)| !line.is_empty()).map(host).collect::<Result<Vec<_>>>()?;
    ensure!(!hosts.is_empty(), "the host file {} names no host", path.display());
    added_up(hosts)
}

fn parse_line(line: &str) -> Result<Host> {
    let mut words = line.split_whitespace();
    let mut host = parse_entry(words.next().unwrap_or(""))?;
    for word in words {
        match word.split_once('=') {
            Some(("slots", slots)) => host.slots = parse_slots(&host.name, slots)?,
            _ => bail!("`{word}` is not understood; expected `host slots=N` or `host:N`"),
        }
    }
    Ok(host)
}

fn parse_entry(entry: &str) -> Result<Host> {
    let (name, slots) = match entry.strip_prefix('[') {
        // An IPv6 address.
        Some(rest) => {
            let (name, rest) = rest.split_once(']').with_context(|| format!("`{entry}` has no closing `]`"))?;
            (name, rest.strip_prefix(':'))
        }
        None if entry.matches(':').count() > 1 => bail!("`{entry}`: write an IPv6 address in brackets, `[::1]:2`"),
        None => entry.split_once(':').map_or((entry, None), |(name, slots)| (name, Some(slots))),
    };
    let usual = |c: char| c.is_ascii_alphanumeric() || "._-@:%".contains(c);
    // `ssh` would take a name that begins with a dash for an option.
    if name.is_empty() || name.starts_with('-') || !name.chars().all(usual) {
        bail!("`{entry}` does not name a host; expected `host:slots`, for instance `node1:4`");
    }
    let slots = slots.map_or(Ok(1), |slots| parse_slots(name, slots))?;
    Ok(Host { name: name.into(), slots })
}

fn parse_slots(name: &str, slots: &str) -> Result<usize> {
    let slots: usize =
        slots.parse().with_context(|| format!("host {name} has `{slots}` slots; expected a whole number"))?;
    ensure!(slots > 0, "host {name} has 0 slots; leave it out");
    Ok(slots)
}

/// The slots of a host that is named more than once add up, at its first place, as `mpirun` has it.
fn added_up(hosts: Vec<Host>) -> Result<Vec<Host>> {
    let mut sums: Vec<Host> = Vec::new();
    for host in hosts {
        match sums.iter_mut().find(|sum| sum.name == host.name) {
            Some(sum) => {
                let slots = sum.slots.checked_add(host.slots);
                sum.slots = slots.with_context(|| format!("host {} has too many slots", host.name))?;
            }
            None => sums.push(host),
        }
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, slots: usize) -> Host {
        Host { name: name.into(), slots }
    }

    #[test]
    fn a_list_of_hosts() {
        let expected = [host("node1", 4), host("me@10.0.0.2", 1), host("fe80::1%eth0", 2)];
        assert_eq!(parse_list("node1:4, me@10.0.0.2,[fe80::1%eth0]:2").unwrap(), expected);
        assert_eq!(expected[1].address_elsewhere(), "10.0.0.2");
        assert_ne!(Host::here(1).address_elsewhere(), "localhost");
    }

    #[test]
    fn a_host_that_is_named_again_takes_more_ranks() {
        assert_eq!(parse_list("a:1,b:1,a:2,b").unwrap(), [host("a", 3), host("b", 2)]);
    }

    #[test]
    fn a_host_file_in_either_spelling() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        std::fs::write(&path, "# the cluster\nnode1 slots=4 # fast\n\n  node2:2\nnode3\nnode1\n").unwrap();
        assert_eq!(read_file(&path).unwrap(), [host("node1", 5), host("node2", 2), host("node3", 1)]);
        for (text, expected) in
            [("node1 slots=x", "line 1"), ("\nnode1 cores=3", "`cores=3`"), ("# nothing", "names no host")]
        {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", read_file(&path).unwrap_err());
            assert!(error.contains(expected) && error.contains("hosts"), "{error}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (text, expected) in [
            ("", "does not name a host"),
            ("a,,b", "does not name a host"),
            ("-oProxyCommand=x:1", "does not name a host"),
            ("a b:1", "does not name a host"),
            ("a:0", "0 slots"),
            ("a:-1", "`-1` slots"),
            ("::1", "brackets"),
            ("[::1", "closing"),
            ("a:1,a:18446744073709551615", "too many slots"),
        ] {
            let error = format!("{:#}", parse_list(text).expect_err(text));
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn this_host_is_known_by_its_names() {
        assert!(host("localhost", 1).is_here() && host("127.0.0.1", 1).is_here());
        assert!(host(&rustix::system::uname().nodename().to_string_lossy(), 1).is_here());
        assert!(!host("some.other.host", 1).is_here() && !host("root@localhost", 1).is_here());
    }
}
