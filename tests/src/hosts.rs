//! Several hosts on one machine: network namespaces, joined by a switch in a namespace of its own. They share no network,
//! no host-wide sockets and no loopback device; processes and files they do share.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Hosts in one network, gone when this is dropped.
pub struct Hosts {
    names: Vec<String>,
    switch: String,
    folder: tempfile::TempDir,
}

/// How a host loses its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// At the switch: what the host sends is lost.
    Cable,
    /// On the host: it knows of no way any more.
    Card,
}

impl Hosts {
    /// Makes `count` hosts; `None`, with a message, where that right is missing.
    pub fn new(count: usize) -> Option<Hosts> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let network = format!("hvd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let names = (0..count).map(|host| format!("{network}-{host}")).collect();
        let folder = tempfile::tempdir().expect("a folder");
        let hosts = Hosts { names, switch: format!("{network}-switch"), folder };
        let made = hosts.make();
        if !made {
            crate::skipped("no right to make network namespaces here (root and iproute2 are needed)");
        }
        made.then_some(hosts)
    }

    /// A host's address.
    pub fn address(&self, host: usize) -> String {
        format!("10.77.0.{}", host + 1)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// A command that becomes `program` on a host.
    pub fn command(&self, host: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]).arg(program);
        command
    }

    /// Limits what each host sends and gets to `rate`, in the words of tc(8).
    ///
    /// # Panics
    /// If the system refuses.
    pub fn limit(self, rate: &str) -> Hosts {
        for (host, name) in self.names.iter().enumerate() {
            for (namespace, device) in [(name, "eth0".to_string()), (&self.switch, format!("port{host}"))] {
                let queue = format!("qdisc add dev {device} root tbf rate {rate} burst 256kb latency 50ms");
                assert!(run(&format!("ip netns exec {namespace} tc {queue}")), "cannot limit host {host} to {rate}");
            }
        }
        self
    }

    /// Arguments with which `hvdrun` starts so many ranks on each host. In the place of ssh, a script enters the host's
    /// namespace.
    ///
    /// # Panics
    /// If the script cannot be written.
    pub fn hvdrun_args(&self, ranks: &[usize]) -> [String; 4] {
        let script = self.folder.path().join("enter.sh");
        let places =
            self.names.iter().enumerate().map(|(host, name)| format!("{}) name={name} ;;\n", self.address(host)));
        let places: String = places.collect();
        let text = format!("case $1 in\n{places}esac\nshift\nexec ip netns exec $name sh -c \"$*\"\n");
        std::fs::write(&script, text).expect("a script");
        let list = ranks.iter().enumerate().map(|(host, ranks)| format!("{}:{ranks}", self.address(host)));
        let list = list.collect::<Vec<_>>().join(",");
        ["-H".into(), list, "--ssh-command".into(), format!("sh {}", script.display())]
    }

    /// Cuts a host off from all others, in both directions.
    ///
    /// # Panics
    /// If the system refuses.
    pub fn cut(&self, host: usize, how: Cut) {
        assert!(run(&self.cutting(host, how)), "cannot cut host {host} off");
    }

    /// The command that does [`Hosts::cut`], for [`run`].
    pub fn cutting(&self, host: usize, how: Cut) -> String {
        match how {
            Cut::Cable => format!("ip -n {} link set port{host} down", self.switch),
            Cut::Card => format!("ip -n {} link set eth0 down", self.names[host]),
        }
    }

    fn make(&self) -> bool {
        let Hosts { names, switch, .. } = self;
        run(&format!("ip netns add {switch}"))
            && run(&format!("ip -n {switch} link add switch type bridge"))
            && run(&format!("ip -n {switch} link set switch up"))
            && names.iter().enumerate().all(|(host, name)| self.plug_in(host, name))
    }

    fn plug_in(&self, host: usize, name: &str) -> bool {
        let Hosts { switch, .. } = self;
        run(&format!("ip netns add {name}"))
            && run(&format!("ip -n {name} link set lo up"))
            && run(&format!("ip -n {switch} link add port{host} type veth peer name eth0 netns {name}"))
            && run(&format!("ip -n {switch} link set port{host} master switch up"))
            && run(&format!("ip -n {name} address add {}/24 dev eth0", self.address(host)))
            && run(&format!("ip -n {name} link set eth0 up"))
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.names.iter().chain([&self.switch]) {
            run(&format!("ip netns delete {name}"));
        }
    }
}

/// Runs a command in silence; gives whether it succeeded.
pub fn run(line: &str) -> bool {
    let words: Vec<_> = line.split(' ').collect();
    let command = Command::new(words[0]).args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    command.is_ok_and(|status| status.success())
}
