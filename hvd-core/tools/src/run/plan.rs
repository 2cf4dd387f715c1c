//! Which rank runs where.

use anyhow::{Result, bail, ensure};
use hvd_core::Topology;

use super::hosts::Host;

/// The ranks of a job, dealt to hosts in blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The hosts that get ranks, each with its ranks.
    pub hosts: Vec<(Host, Vec<Topology>)>,
    /// Number of ranks.
    pub size: usize,
}

impl Plan {
    /// Deals `size` ranks to `hosts`: each is filled before the next gets any. Without a size all slots are filled;
    /// without hosts all ranks run here.
    ///
    /// # Errors
    /// Where neither says how many ranks there are, or the hosts have too little room.
    pub fn new(size: Option<usize>, hosts: Vec<Host>) -> Result<Plan> {
        let room: usize = hosts.iter().map(|host| host.slots).sum();
        let size = match size {
            Some(size) => size,
            None if room > 0 => room,
            None => bail!("how many ranks? Say `-np N`, or name hosts and slots with `-H host:slots,…`"),
        };
        ensure!(size > 0, "-np 0 starts nothing; expected at least 1 rank");
        let hosts = if hosts.is_empty() { vec![Host::here(size)] } else { hosts };
        ensure!(
            hosts.iter().map(|host| host.slots).sum::<usize>() >= size,
            "{size} ranks do not fit into the {room} slots of {}; add hosts or slots, or lower -np",
            names(&hosts)
        );
        Ok(Plan { hosts: deal(size, hosts), size })
    }

    /// Whether all ranks are on one host.
    pub fn is_single_host(&self) -> bool {
        self.hosts.len() == 1
    }

    /// The name of the host that a rank runs on.
    pub fn host_of(&self, rank: usize) -> &str {
        let found = self.hosts.iter().find(|(_, ranks)| ranks.iter().any(|place| place.rank == rank));
        found.map_or("?", |(host, _)| &host.name)
    }
}

fn names(hosts: &[Host]) -> String {
    hosts.iter().map(|host| format!("{}:{}", host.name, host.slots)).collect::<Vec<_>>().join(",")
}

fn deal(size: usize, hosts: Vec<Host>) -> Vec<(Host, Vec<Topology>)> {
    let mut left = size;
    let mut counts = Vec::new();
    for host in hosts {
        let count = host.slots.min(left);
        left -= count;
        if count > 0 {
            counts.push((host, count));
        }
    }
    let sizes: Vec<_> = counts.iter().map(|(_, count)| *count).collect();
    let ranks = |at: usize| (0..sizes[at]).map(|local_rank| place(&sizes, at, local_rank)).collect();
    counts.into_iter().enumerate().map(|(at, (host, _))| (host, ranks(at))).collect()
}

/// The place of a rank on the host `at`, where the hosts have `sizes` ranks.
fn place(sizes: &[usize], at: usize, local_rank: usize) -> Topology {
    let with_this_local_rank = |sizes: &[usize]| sizes.iter().filter(|&&size| size > local_rank).count();
    Topology {
        rank: sizes[..at].iter().sum::<usize>() + local_rank,
        size: sizes.iter().sum(),
        local_rank,
        local_size: sizes[at],
        cross_rank: with_this_local_rank(&sizes[..at]),
        cross_size: with_this_local_rank(sizes),
    }
}

/// A rank's place as the variables that the runtime reads.
pub fn variables(place: &Topology) -> [(&'static str, usize); 6] {
    [
        ("HVD_RANK", place.rank),
        ("HVD_SIZE", place.size),
        ("HVD_LOCAL_RANK", place.local_rank),
        ("HVD_LOCAL_SIZE", place.local_size),
        ("HVD_CROSS_RANK", place.cross_rank),
        ("HVD_CROSS_SIZE", place.cross_size),
    ]
}

#[cfg(test)]
mod tests {
    use hvd_core::topology::Launch;
    use proptest::prelude::*;

    use super::super::hosts::parse_list;
    use super::*;

    fn plan(size: Option<usize>, hosts: &str) -> Result<Plan> {
        Plan::new(size, if hosts.is_empty() { Vec::new() } else { parse_list(hosts)? })
    }

    fn counts(plan: &Plan) -> Vec<(&str, usize)> {
        plan.hosts.iter().map(|(host, ranks)| (host.name.as_str(), ranks.len())).collect()
    }

    #[test]
    fn hosts_are_filled_one_after_the_other() {
        assert_eq!(counts(&plan(Some(3), "").unwrap()), [("localhost", 3)]);
        assert_eq!(counts(&plan(None, "a:2,b:1").unwrap()), [("a", 2), ("b", 1)]);
        let three = plan(Some(3), "a:2,b:2,c:2").unwrap();
        assert_eq!(counts(&three), [("a", 2), ("b", 1)]);
        assert_eq!((three.host_of(1), three.host_of(2)), ("a", "b"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (size, hosts, expected) in [
            (None, "", "-np N"),
            (Some(0), "", "-np 0"),
            (Some(4), "a:2,b:1", "do not fit into the 3 slots of a:2,b:1"),
        ] {
            let error = plan(size, hosts).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    proptest! {
        /// The runtime reads back what was planned, and the numbers are those of Horovod's definitions.
        #[test]
        fn the_runtime_understands_every_place(slots in prop::collection::vec(1usize..5, 1..6)) {
            let hosts = slots.iter().enumerate().map(|(at, &slots)| Host { name: format!("h{at}"), slots }).collect();
            let plan = Plan::new(None, hosts).unwrap();
            let places: Vec<_> = plan.hosts.iter().flat_map(|(_, places)| places.clone()).collect();
            for (rank, place) in places.iter().enumerate() {
                let vars = variables(place).map(|(name, value)| (name.to_string(), value.to_string()));
                prop_assert_eq!(&Launch::from_vars(&vars.into(), 1).unwrap().topology, place);
                prop_assert_eq!(place.rank, rank);
                let peers: Vec<_> = places.iter().filter(|peer| peer.local_rank == place.local_rank).collect();
                prop_assert_eq!(peers.len(), place.cross_size);
                prop_assert_eq!(peers[place.cross_rank].rank, rank);
            }
        }
    }
}
