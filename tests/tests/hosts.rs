//! Several hosts, each a network namespace, with links of limited rate between them.

use hvd_tests::{Finished, Hosts, Job, Launcher, binary, seed};

/// A job with so many ranks on each host.
fn worker(hosts: &Hosts, ranks: &[usize]) -> Job {
    let job = Job::new(binary("hvd-worker"), ranks.iter().sum()).launcher(Launcher::Hvdrun);
    job.launcher_args(hosts.hvdrun_args(ranks))
}

fn conformance(hosts: &Hosts, ranks: &[usize], backend: &str) -> Job {
    let seed = seed().to_string();
    worker(hosts, ranks).args(["conformance", "--expect-backend", backend, "--seed", &seed, "--cases", "8"])
}

#[test]
fn all_operations_are_right_on_even_and_uneven_hosts() {
    let cases =
        [(&[2, 2][..], "hierarchical"), (&[2, 1], "hierarchical"), (&[3, 1, 2], "hierarchical"), (&[1, 1, 1], "tcp")];
    for (ranks, backend) in cases {
        let Some(hosts) = Hosts::new(ranks.len()) else { return };
        let hosts = hosts.limit("1gbit");
        conformance(&hosts, ranks, backend).run().assert_success();
    }
}

#[test]
fn ranks_that_must_not_share_memory_or_reduce_within_their_host_use_one_ring() {
    let Some(hosts) = Hosts::new(2) else { return };
    for (variable, backend) in [("HVD_SHM", "tcp"), ("HVD_HIERARCHICAL_ALLREDUCE", "tcp")] {
        conformance(&hosts, &[2, 2], backend).var(variable, 0).run().assert_success();
    }
}

/// What each rank printed of its place.
fn places(finished: &Finished) -> Vec<String> {
    let mut places: Vec<_> =
        finished.stdout.lines().filter_map(|line| line.split("Topology ").nth(1)).map(String::from).collect();
    places.sort();
    places
}

#[test]
fn every_rank_knows_its_place_among_the_hosts() {
    let Some(hosts) = Hosts::new(2) else { return };
    let finished = worker(&hosts, &[2, 1]).args(["topology"]).run();
    finished.assert_success();
    let expected = [(0, 0, 2, 0, 2), (1, 1, 2, 0, 1), (2, 0, 1, 1, 2)].map(|(rank, local, here, cross, hosts)| {
        format!("{{ rank: {rank}, size: 3, local_rank: {local}, local_size: {here}, cross_rank: {cross}, cross_size: {hosts} }}")
    });
    assert_eq!(places(&finished), expected);
}
