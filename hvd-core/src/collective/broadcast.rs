//! Broadcast down a binomial tree.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Collective, retire, segments};
use crate::error::Result;
use crate::memory::Memory;
use crate::transport::{Request, Tag, Transport};

/// Segments that are being received, or sent to all children, at a time.
const WINDOW: usize = 4;

/// The root's buffer, on all ranks.
///
/// A binomial tree: counted from the root, rank `r` receives from `r` without its lowest set bit, and passes each
/// segment on, as soon as it has it, to `r` plus each lower power of two. ⌈log₂ n⌉ steps for the first segment, one
/// behind another for the rest. The root sends ⌈log₂ n⌉ times the buffer, half of the ranks nothing.
pub struct Broadcast {
    buffer: Memory,
    segments: Vec<Range<usize>>,
    /// `None` for the root.
    parent: Option<usize>,
    /// Largest subtree first.
    children: Vec<usize>,
    tag: Tag,
    /// Receives before this segment are posted.
    posted: usize,
    /// Segments before this one are here.
    taken: usize,
    /// Segments before this one are being sent.
    sent: usize,
    receives: VecDeque<Request>,
    sends: VecDeque<Request>,
}

impl Broadcast {
    /// Sends (on `root`) or fills `buffer`; its length, the root and the segment's size must be the same on all ranks.
    ///
    /// # Panics
    /// If there is no such rank or root.
    pub fn new(rank: usize, size: usize, root: usize, buffer: Memory, tag: Tag, segment_bytes: usize) -> Self {
        assert!(rank < size && root < size, "rank {rank}, root {root} of {size}");
        let segments: Vec<_> = segments(0..buffer.len(), segment_bytes, 1).collect();
        let (parent, children) = family((rank + size - root) % size, size);
        let absolute = |relative: usize| (relative + root) % size;
        let here = if parent.is_none() { segments.len() } else { 0 };
        Broadcast {
            buffer,
            parent: parent.map(absolute),
            children: children.into_iter().map(absolute).collect(),
            tag,
            posted: here,
            taken: here,
            sent: 0,
            receives: VecDeque::new(),
            sends: VecDeque::new(),
            segments,
        }
    }

    fn receive(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let Some(parent) = self.parent else { return Ok(false) };
        let before = (self.posted, self.taken);
        while self.posted < self.segments.len() && self.receives.len() < WINDOW {
            let into = self.buffer.slice(self.segments[self.posted].clone());
            self.receives.push_back(transport.recv(parent, self.tag, into)?);
            self.posted += 1;
        }
        self.taken += retire(&mut self.receives, transport)?;
        Ok((self.posted, self.taken) != before)
    }

    fn pass_on(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let mut moved = retire(&mut self.sends, transport)? > 0;
        while self.sent < self.taken && self.sends.len() <= (WINDOW - 1) * self.children.len() {
            for &child in &self.children {
                let segment = self.buffer.slice(self.segments[self.sent].clone());
                self.sends.push_back(transport.send(child, self.tag, segment)?);
            }
            self.sent += 1;
            moved = true;
        }
        Ok(moved)
    }
}

/// Parent and children in the tree whose root is 0.
fn family(rank: usize, size: usize) -> (Option<usize>, Vec<usize>) {
    let lowest_bit = if rank == 0 { size.next_power_of_two() } else { 1 << rank.trailing_zeros() };
    let bits = (0..lowest_bit.ilog2()).rev().map(|bit| 1 << bit);
    let children = bits.map(|bit: usize| rank + bit).filter(|&child| child < size).collect();
    ((rank != 0).then(|| rank - lowest_bit), children)
}

impl Collective for Broadcast {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        loop {
            let mut moved = self.receive(transport)?;
            moved |= self.pass_on(transport)?;
            if self.sent == self.segments.len() && self.sends.is_empty() {
                return Ok(true);
            }
            if !moved {
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::family;

    #[test]
    fn every_rank_is_the_child_of_its_parent_and_of_no_other() {
        for size in 1..=33 {
            let mut parents = vec![None; size];
            for rank in 0..size {
                for child in family(rank, size).1 {
                    assert_eq!(parents[child].replace(rank), None, "two parents of {child}");
                }
            }
            for (rank, parent) in parents.into_iter().enumerate() {
                assert_eq!(parent, family(rank, size).0, "parent of {rank} of {size}");
            }
        }
    }
}
