//! What the tests of shared memory share: groups on threads, driven as the engine drives them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hvd_core::Result;
use hvd_core::collective::Collective;
use hvd_core::shm::ShmGroup;
use hvd_core::transport::Transport;
use hvd_core::transport::thread::ThreadTransport;

/// A rank and its group.
pub struct Member {
    pub transport: Box<dyn Transport>,
    pub group: Arc<ShmGroup>,
    /// How often all operations are polled in vain before the rank sleeps.
    pub spins: u32,
    pub longest_nap: Duration,
}

impl Member {
    /// Polls operations until all are complete, sleeping where nothing moves.
    #[allow(dead_code)] // Not every test runs operations.
    pub fn run(&mut self, ops: &mut [Box<dyn Collective>]) {
        let mut open: Vec<_> = ops.iter_mut().collect();
        self.until(|transport| {
            open.retain_mut(|op| !op.poll(transport).unwrap());
            Ok(open.is_empty())
        });
    }

    /// Polls until `done`, sleeping where nothing moves.
    pub fn until(&mut self, mut done: impl FnMut(&mut dyn Transport) -> Result<bool>) {
        let mut vain = 0;
        while !done(&mut *self.transport).unwrap() {
            vain = if self.transport.progress().unwrap() { 0 } else { vain + 1 };
            if vain > self.spins && self.group.prepare_sleep(&mut *self.transport).unwrap() {
                let start = Instant::now();
                self.transport.waiter().wait(Some(Duration::from_secs(5)));
                self.longest_nap = self.longest_nap.max(start.elapsed());
                self.group.awake();
                vain = 0;
            }
        }
    }
}

pub fn form(transport: &mut dyn Transport, slot_bytes: usize) -> Result<Option<Arc<ShmGroup>>> {
    ShmGroup::form(transport, slot_bytes, Instant::now() + Duration::from_secs(20))
}

/// Runs `body` on each rank of a world of threads that share memory.
pub fn in_group<R: Send>(ranks: usize, slot_bytes: usize, body: impl Fn(&mut Member) -> R + Sync) -> Vec<R> {
    let world = ThreadTransport::world(ranks).into_iter().map(|rank| Box::new(rank) as super::support::Rank);
    super::support::on_each(world.collect(), |mut transport| {
        let group = form(&mut *transport, slot_bytes).unwrap().expect("threads are on one host");
        let mut member = Member { transport, group, spins: 20, longest_nap: Duration::ZERO };
        let result = body(&mut member);
        super::support::close(member.transport);
        result
    })
}
