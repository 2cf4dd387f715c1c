//! Worlds whose ranks all run on the test's own thread, in turns: that is fast at any size and finds every wait that never
//! ends (too many turns without an end) without a clock.
#![allow(dead_code)] // Each test binary uses a part.

use std::ops::Range;

use super::elements::Random;
use hvd_core::collective::Collective;
use hvd_core::transport::thread::{Delays, ThreadTransport};
use hvd_core::transport::{Tag, Transport};

/// Turns in which nobody gets done before a world counts as hung.
pub const PATIENCE: usize = 2_000_000;

pub const TAG: Tag = Tag { channel: 3, sequence: u32::MAX };

pub type Operation = Box<dyn Collective>;

pub fn world(size: usize, delays: Option<Delays>) -> Vec<ThreadTransport> {
    match delays {
        Some(delays) => ThreadTransport::world_with_delays(size, delays),
        None => ThreadTransport::world(size),
    }
}

/// Runs one operation on every rank, in turns.
pub fn run_all(mut world: Vec<ThreadTransport>, mut operations: Vec<Operation>) {
    let mut pending: Vec<_> = (0..world.len()).collect();
    for _ in 0..PATIENCE {
        for transport in &mut world {
            transport.progress().unwrap();
        }
        pending.retain(|&rank| !operations[rank].poll(&mut world[rank]).unwrap());
        if pending.is_empty() {
            return;
        }
    }
    panic!("ranks {pending:?} wait for ever");
}

/// Cuts a length at random places: uneven ranges, some of them empty, in order.
pub fn uneven(len: usize, parts: usize, seed: u64) -> Vec<Range<usize>> {
    let mut random = Random(seed);
    let mut cuts: Vec<_> = (1..parts).map(|_| (random.next() % (len as u64 + 1)) as usize).collect();
    cuts.extend([0, len]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

pub fn delays(seed: u64) -> Option<Delays> {
    Some(Delays { seed, max_polls: 7 })
}
