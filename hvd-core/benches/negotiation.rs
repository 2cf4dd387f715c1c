//! The cost of negotiating 1000 tensors on 2 to 1024 simulated ranks: `cargo bench -p hvd-core --bench negotiation`.
//!
//! The network is one of 10 µs and 10 Gbit/s. `first`: nobody has seen the tensors; `again`: they are in the response cache.

use hvd_core::Result;
use hvd_core::engine::simulation::{Cost, Network, Simulation};

const TENSORS: usize = 1000;

fn main() -> Result<()> {
    let names: Vec<_> = (0..TENSORS).map(|index| format!("block.{}.weight.{index}", index / 12)).collect();
    println!(
        "{TENSORS} tensors, 10 µs, 10 Gbit/s; messages and bytes are those one after the other on the longest way"
    );
    println!(
        "ranks |  first: rounds  messages      bytes        µs |  again: rounds  messages   bytes      µs  sent/rank"
    );
    for size in (1..=10).map(|power| 1 << power) {
        let mut simulation = Simulation::new(size, TENSORS, Network { latency_ns: 10_000, bandwidth: 1.25 });
        let (first, again) = (simulation.negotiate(&names)?, simulation.negotiate(&names)?);
        let micros = |cost: Cost| cost.nanos as f64 / 1e3;
        println!(
            "{size:5} | {:14} {:9} {:10} {:9.1} | {:14} {:9} {:7} {:7.1} {:10}",
            first.rounds,
            first.critical_messages,
            first.critical_bytes,
            micros(first),
            again.rounds,
            again.critical_messages,
            again.critical_bytes,
            micros(again),
            again.sent_messages,
        );
    }
    Ok(())
}
