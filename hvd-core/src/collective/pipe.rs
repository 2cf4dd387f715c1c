//! A memory on its way to or from one peer, segment by segment.

use std::collections::VecDeque;

use super::{retire, segments};
use crate::error::Result;
use crate::memory::Memory;
use crate::transport::{Request, Tag, Transport};

/// Segments that are under way at a time.
const WINDOW: usize = 4;

/// Which way the bytes go.
#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
}

/// One direction of a transfer. Nothing is sent for an empty memory.
pub(super) struct Pipe {
    way: Way,
    peer: usize,
    tag: Tag,
    segments: VecDeque<Memory>,
    requests: VecDeque<Request>,
}

impl Pipe {
    /// Sends `memory` to `peer`, which receives it with a pipe of the same segments and element size.
    pub fn to(peer: usize, memory: &Memory, tag: Tag, segment_bytes: usize, element_bytes: usize) -> Self {
        Self::new(Way::Out, peer, memory, tag, segment_bytes, element_bytes)
    }

    /// Receives `memory` from `peer`.
    pub fn from(peer: usize, memory: &Memory, tag: Tag, segment_bytes: usize, element_bytes: usize) -> Self {
        Self::new(Way::In, peer, memory, tag, segment_bytes, element_bytes)
    }

    fn new(way: Way, peer: usize, memory: &Memory, tag: Tag, segment_bytes: usize, element_bytes: usize) -> Self {
        let segments = segments(0..memory.len(), segment_bytes, element_bytes).map(|range| memory.slice(range));
        Pipe { way, peer, tag, segments: segments.collect(), requests: VecDeque::new() }
    }

    /// Goes on without waiting. Gives whether anything moved.
    pub fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let mut moved = retire(&mut self.requests, transport)? > 0;
        while self.requests.len() < WINDOW
            && let Some(segment) = self.segments.pop_front()
        {
            let request = match self.way {
                Way::Out => transport.send(self.peer, self.tag, segment),
                Way::In => transport.recv(self.peer, self.tag, segment),
            };
            self.requests.push_back(request?);
            moved = true;
        }
        Ok(moved)
    }

    /// Whether all bytes have moved and the memory is at rest.
    pub fn is_done(&self) -> bool {
        self.segments.is_empty() && self.requests.is_empty()
    }
}

/// Polls the first `active` pipes and drops those that are done. Gives whether anything moved.
pub(super) fn poll_all(pipes: &mut VecDeque<Pipe>, active: usize, transport: &mut dyn Transport) -> Result<bool> {
    let before = pipes.len();
    let mut moved = false;
    for pipe in pipes.iter_mut().take(active) {
        moved |= pipe.poll(transport)?;
    }
    pipes.retain(|pipe| !pipe.is_done());
    Ok(moved || pipes.len() < before)
}
