//! Time of an allreduce through shared memory, float32 sum, in place, ranks on threads: to compare with the limit.
//!
//! ```text
//! cargo run --release -p hvd-core --example shm_bandwidth -- [ranks] [slot KiB] [largest KiB]
//! ```
use std::time::{Duration, Instant};

use hvd_core::collective::{Collective, Reduction};
use hvd_core::shm::{Part, ShmAllreduce, ShmBarrier, ShmGroup};
use hvd_core::transport::Transport;
use hvd_core::transport::thread::ThreadTransport;
use hvd_core::{DType, Memory, ReduceOp, Result};

const ITERATIONS: usize = 41;
const SPINS: u32 = 200;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse().expect("a number"));
    let ranks = arguments.next().unwrap_or(2);
    let slot_bytes = arguments.next().unwrap_or(128) << 10;
    let largest = arguments.next().unwrap_or(64 << 10) << 10;
    std::thread::scope(|scope| {
        let threads: Vec<_> = ThreadTransport::world(ranks)
            .into_iter()
            .map(|mut transport| scope.spawn(move || measure(&mut transport, slot_bytes, largest)))
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a rank panicked"))
    })
}

fn measure(transport: &mut ThreadTransport, slot_bytes: usize, largest: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let group = ShmGroup::form(transport, slot_bytes, deadline)?.expect("threads are on one host");
    for bytes in (6..).map(|power| 1usize << (2 * power)).take_while(|&bytes| bytes <= largest) {
        let memory = Memory::from_vec(vec![1f32; bytes / 4]);
        let mut times = Vec::new();
        for _ in 0..ITERATIONS + 3 {
            // SAFETY: no operation uses the memory now.
            unsafe { memory.as_mut_slice() }.fill(0);
            wait(&group, transport, ShmBarrier::new(group.clone()))?;
            let start = Instant::now();
            let part = Part { input: memory.clone(), output: memory.clone(), elements: bytes / 4 };
            let reduction = Reduction { dtype: DType::F32, op: ReduceOp::Sum, scale: 1.0 };
            wait(&group, transport, ShmAllreduce::new(group.clone(), vec![part], DType::F32, reduction, 1.0, 1.0)?)?;
            times.push(start.elapsed());
        }
        times.drain(..3);
        times.sort();
        if transport.rank() == 0 {
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            println!("{bytes:>10} bytes  median {:>10.1} us  min {:>10.1} us", us(times[ITERATIONS / 2]), us(times[0]));
        }
    }
    wait(&group, transport, ShmBarrier::new(group.clone()))
}

/// Drives an operation as the engine does.
fn wait(group: &ShmGroup, transport: &mut dyn Transport, mut op: impl Collective) -> Result<()> {
    let mut vain = 0;
    while !op.poll(transport)? {
        vain += 1;
        if vain > SPINS && group.prepare_sleep(transport)? {
            transport.progress()?;
            transport.waiter().wait(None);
            group.awake();
            vain = 0;
        }
    }
    Ok(())
}
