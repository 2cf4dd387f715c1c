//! Dissemination barrier.

use super::{Collective, settled};
use crate::error::Result;
use crate::memory::Memory;
use crate::transport::{Request, Tag, Transport};

/// Is done on a rank once it has begun on all of them.
///
/// In step `k` each rank tells rank + 2ᵏ and hears from rank - 2ᵏ, and so learns of twice as many. ⌈log₂ n⌉ steps of
/// one byte each.
pub struct Barrier {
    rank: usize,
    size: usize,
    tag: Tag,
    /// How far away the peers of the next step are.
    distance: usize,
    sending: Option<Request>,
    receiving: Option<Request>,
}

impl Barrier {
    /// A barrier of all ranks.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn new(rank: usize, size: usize, tag: Tag) -> Self {
        assert!(rank < size, "rank {rank} of {size}");
        Barrier { rank, size, tag, distance: 1, sending: None, receiving: None }
    }
}

impl Collective for Barrier {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        loop {
            let sent = settled(&mut self.sending, transport)?;
            let received = settled(&mut self.receiving, transport)?;
            if !(sent && received) {
                return Ok(false);
            }
            if self.distance >= self.size {
                return Ok(true);
            }
            let from = (self.rank + self.size - self.distance) % self.size;
            let to = (self.rank + self.distance) % self.size;
            self.receiving = Some(transport.recv(from, self.tag, Memory::zeroed(1))?);
            self.sending = Some(transport.send(to, self.tag, Memory::zeroed(1))?);
            self.distance *= 2;
        }
    }
}
