//! Hierarchical allreduce, with threads for ranks and any division of them into hosts.

mod elements;
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use elements::{assert_expected, random_elements, reference, supported};
use hvd_core::collective::{Collective, HierarchicalAllreduce, Hosts, Reduction, even_chunks};
use hvd_core::transport::thread::ThreadTransport;
use hvd_core::{DType, Memory, ReduceOp};
use proptest::prelude::*;
use support::{Rank, bytes, on_each, tag, watched};

const SLOT_BYTES: usize = 4096;

/// Runs an operation as the engine does.
fn run(operation: &mut dyn Collective, rank: &mut Rank, hosts: &Hosts) {
    while !operation.poll(&mut **rank).unwrap() {
        if rank.progress().unwrap() || !hosts.prepare_sleep(&mut **rank).unwrap() {
            continue;
        }
        rank.waiter().wait(Some(Duration::from_secs(5)));
        hosts.group().iter().for_each(|group| group.awake());
    }
}

/// This rank's view of the hosts; those with several ranks share memory.
fn hosts_of(rank: &mut Rank, hosts: &[Vec<usize>]) -> Arc<Hosts> {
    let deadline = Instant::now() + Duration::from_secs(20);
    Arc::new(Hosts::form(&mut **rank, hosts, SLOT_BYTES, deadline).unwrap().expect("threads are on one host"))
}

/// Every rank's result of reducing `inputs` twice.
fn reduce(hosts: &[Vec<usize>], inputs: &[Vec<u8>], reduction: Reduction, segment_bytes: usize) -> Vec<[Vec<u8>; 2]> {
    let world = ThreadTransport::world(inputs.len()).into_iter().map(|rank| Box::new(rank) as Rank);
    on_each(world.collect(), |mut rank| {
        let hosts = hosts_of(&mut rank, hosts);
        let results = [0, 1].map(|round| {
            let buffer = Memory::from_vec(inputs[rank.rank()].clone());
            let chunks = even_chunks(buffer.len() / reduction.dtype.size(), hosts.chunks());
            let (ranks, tag) = (rank.size(), tag(round));
            let operation = HierarchicalAllreduce::new(
                hosts.clone(),
                ranks,
                buffer.clone(),
                &chunks,
                reduction,
                tag,
                segment_bytes,
            );
            run(&mut operation.unwrap(), &mut rank, &hosts);
            bytes(&buffer).to_vec()
        });
        support::close(rank);
        results
    })
}

/// Deals the ranks to hosts, in any order.
fn divisions() -> impl Strategy<Value = Vec<Vec<usize>>> {
    prop::collection::vec(0usize..4, 1..8).prop_map(|host_of| {
        let ranks = |host| (0..host_of.len()).filter(|&rank| host_of[rank] == host).collect::<Vec<_>>();
        (0..4).map(ranks).filter(|ranks| !ranks.is_empty()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_rank_gets_the_reduction_over_all_and_the_same_bits_each_time(
        hosts in divisions(),
        (op, dtype) in prop::sample::select(supported()),
        elements in prop_oneof![0usize..40, 1000usize..9000],
        segment_bytes in 1usize..5000,
        scale in prop::sample::select(vec![1.0, 0.5]),
        seed: u64,
    ) {
        let ranks = hosts.iter().map(Vec::len).sum();
        let inputs: Vec<_> =
            (0..ranks).map(|rank| random_elements(seed ^ rank as u64, op, dtype, elements)).collect();
        let scale = if dtype.is_float() { scale } else { 1.0 };
        let expected = reference(op, dtype, &inputs, scale);
        watched(move || {
            let results = reduce(&hosts, &inputs, Reduction { dtype, op, scale }, segment_bytes);
            assert_expected(dtype, &results[0][0], &expected, &format!("{op:?} of {dtype} on {hosts:?}"));
            assert!(results.iter().flatten().all(|result| *result == results[0][0]), "the bits differ");
        });
    }
}

#[test]
fn parts_follow_from_the_host_with_the_fewest_ranks() {
    watched(|| {
        let inputs = vec![1.0f32.to_ne_bytes().repeat(10); 5];
        for hosts in [&[vec![0, 1], vec![2, 3], vec![4]][..], &[vec![0, 2, 4], vec![1, 3]]] {
            let expected = hosts.len() * hosts.iter().map(Vec::len).min().unwrap();
            let world = ThreadTransport::world(5).into_iter().map(|rank| Box::new(rank) as Rank);
            let chunks = on_each(world.collect(), |mut rank| {
                let chunks = hosts_of(&mut rank, hosts).chunks();
                support::close(rank);
                chunks
            });
            assert_eq!(chunks, [expected; 5]);
            let sum = Reduction::new(DType::F32, ReduceOp::Sum);
            let results = reduce(hosts, &inputs, sum, 8);
            assert_eq!(results[3][1], 5.0f32.to_ne_bytes().repeat(10));
        }
    });
}
