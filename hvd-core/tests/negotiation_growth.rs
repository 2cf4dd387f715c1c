//! What negotiation costs as the world grows.

use hvd_core::engine::simulation::{Cost, Network, Simulation};

const NETWORK: Network = Network { latency_ns: 10_000, bandwidth: 1.0 };

const SIZES: [usize; 14] = [2, 3, 4, 5, 8, 13, 16, 32, 64, 100, 128, 256, 512, 1024];

/// The first time that `size` ranks agree on `tensors` tensors, and the third.
fn first_and_repeated(size: usize, tensors: usize) -> (Cost, Cost) {
    let names: Vec<_> = (0..tensors).map(|index| format!("layer.{index}.weight")).collect();
    let mut simulation = Simulation::new(size, 1024, NETWORK);
    let first = simulation.negotiate(&names).unwrap();
    simulation.negotiate(&names).unwrap();
    (first, simulation.negotiate(&names).unwrap())
}

fn steps(size: usize) -> usize {
    size.next_power_of_two().ilog2() as usize
}

#[test]
fn a_repeated_step_takes_one_round_of_log_n_messages_of_constant_size() {
    let bytes_of_two = first_and_repeated(2, 32).1.critical_bytes;
    for size in SIZES {
        let (_, cost) = first_and_repeated(size, 32);
        assert_eq!(cost.rounds, 1, "{size} ranks");
        assert_eq!(cost.critical_messages, steps(size), "{size} ranks");
        assert_eq!(cost.critical_bytes, steps(size) * bytes_of_two, "{size} ranks");
        assert!(cost.sent_messages < 2 * steps(size), "{size} ranks: {cost:?}");
        assert_eq!(cost.sent_bytes, steps(size) * bytes_of_two, "{size} ranks");
        let latencies = steps(size) as u64 * NETWORK.latency_ns;
        assert!(
            (latencies..latencies + cost.critical_bytes as u64 + 1).contains(&cost.nanos),
            "{size} ranks: {cost:?}"
        );
    }
}

#[test]
fn new_tensors_take_one_round_of_log_n_messages_too() {
    for size in SIZES {
        let (cost, _) = first_and_repeated(size, 2);
        assert_eq!(cost.rounds, 1, "{size} ranks");
        assert_eq!(cost.critical_messages, steps(size), "{size} ranks");
    }
}

#[test]
fn a_thousand_cached_tensors_cost_a_bit_each() {
    let (first, repeated) = first_and_repeated(16, 1000);
    // A varint of seven bits a byte.
    assert!(repeated.critical_bytes <= steps(16) * (1000 / 7 + 40), "{repeated:?}");
    assert!(first.critical_bytes > 100 * repeated.critical_bytes, "{first:?}");
}
