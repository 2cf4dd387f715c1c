//! All-to-all: every rank has a block of its own for every rank, of any length.

use std::collections::VecDeque;
use std::ops::Range;

use super::pipe::{Pipe, poll_all};
use super::{Collective, settled};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::{Request, Tag, Transport};

/// Peers with which a rank exchanges blocks at a time, in each direction.
const PEERS: usize = 8;

/// How many bytes each rank has for each rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splits {
    size: usize,
    /// Row by row: what one rank sends.
    bytes: Vec<usize>,
}

impl Splits {
    /// `rows[from][to]` bytes go from one rank to another.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a row has not as many entries as there are rows, or a rank would send or receive more bytes
    /// than there are addresses.
    pub fn new(rows: &[Vec<usize>]) -> Result<Self> {
        let size = rows.len();
        if let Some(from) = rows.iter().position(|row| row.len() != size) {
            let entries = rows[from].len();
            return Err(Error::Invalid(format!("rank {from} gives {entries} splits in a world of {size}")));
        }
        let splits = Splits { size, bytes: rows.concat() };
        let sums = |of: &dyn Fn(usize) -> usize| (0..size).try_fold(0, |sum: usize, rank| sum.checked_add(of(rank)));
        for rank in 0..size {
            let sent = sums(&|to| splits.bytes(rank, to));
            let received = sums(&|from| splits.bytes(from, rank));
            if sent.is_none() || received.is_none() {
                return Err(Error::Invalid(format!("rank {rank} would exchange more bytes than there are addresses")));
            }
        }
        Ok(splits)
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What `from` sends to `to`, in bytes.
    pub fn bytes(&self, from: usize, to: usize) -> usize {
        self.bytes[from * self.size + to]
    }

    /// Where the blocks for each rank lie in the input of `from`: one after the other.
    pub fn sent(&self, from: usize) -> Vec<Range<usize>> {
        consecutive((0..self.size).map(|to| self.bytes(from, to)))
    }

    /// Where the blocks of each rank lie in the output of `to`: one after the other.
    pub fn received(&self, to: usize) -> Vec<Range<usize>> {
        consecutive((0..self.size).map(|from| self.bytes(from, to)))
    }

    /// The largest block that travels, in bytes.
    pub fn largest(&self) -> usize {
        let travels = |&(at, _): &(usize, &usize)| at / self.size != at % self.size;
        self.bytes.iter().enumerate().filter(travels).map(|(_, &bytes)| bytes).max().unwrap_or(0)
    }

    /// Refuses memories that are not as long as this rank's blocks.
    pub(crate) fn check(&self, rank: usize, input: &Memory, output: &Memory) -> Result<()> {
        let ends = |blocks: Vec<Range<usize>>| blocks.last().map_or(0, |last| last.end);
        let (sent, received) = (ends(self.sent(rank)), ends(self.received(rank)));
        if (input.len(), output.len()) == (sent, received) {
            return Ok(());
        }
        let (input, output) = (input.len(), output.len());
        Err(Error::Invalid(format!(
            "alltoall of {input} into {output} bytes; by the splits it is {sent} into {received}"
        )))
    }
}

/// Spans of the given lengths, one after the other.
fn consecutive(lengths: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let span = |end: &mut usize, length: usize| {
        let start = *end;
        *end += length;
        Some(start..*end)
    };
    lengths.scan(0, span).collect()
}

/// A block that stays on its rank.
struct Own {
    from: Memory,
    to: Memory,
}

impl Own {
    fn new(rank: usize, splits: &Splits, input: &Memory, output: &Memory) -> Self {
        let (from, to) = (splits.sent(rank)[rank].clone(), splits.received(rank)[rank].clone());
        Own { from: input.slice(from), to: output.slice(to) }
    }

    fn copy(&self) {
        copy(&self.from, &self.to);
    }
}

fn copy(from: &Memory, to: &Memory) {
    // SAFETY: both are the operation's, no request for them is under way, and the input does not overlap the output.
    unsafe { to.as_mut_slice().copy_from_slice(from.as_slice()) };
}

/// All-to-all by exchange in pairs: for blocks whose bytes take longer than their messages.
///
/// n-1 steps: in step `k` a rank sends its block for rank + `k` and receives that of rank - `k`, so that no two send to
/// one rank. Steps overlap, eight at a time. Every byte travels once. No scratch memory.
pub struct PairwiseAlltoall {
    own: Option<Own>,
    sends: VecDeque<Pipe>,
    receives: VecDeque<Pipe>,
}

impl PairwiseAlltoall {
    /// Sends the blocks of `input` and fills `output`, which must not overlap. Splits and the segment's size must be the
    /// same on all ranks.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the memories are not as long as the splits say.
    pub fn new(
        rank: usize,
        splits: &Splits,
        input: Memory,
        output: Memory,
        tag: Tag,
        segment_bytes: usize,
    ) -> Result<Self> {
        splits.check(rank, &input, &output)?;
        let (size, sent, received) = (splits.size(), splits.sent(rank), splits.received(rank));
        let to = |step: usize| (rank + step) % size;
        let from = |step: usize| (rank + size - step) % size;
        let send = |peer: usize| Pipe::to(peer, &input.slice(sent[peer].clone()), tag, segment_bytes, 1);
        let receive = |peer: usize| Pipe::from(peer, &output.slice(received[peer].clone()), tag, segment_bytes, 1);
        Ok(PairwiseAlltoall {
            own: Some(Own::new(rank, splits, &input, &output)),
            sends: (1..size).map(to).map(send).collect(),
            receives: (1..size).map(from).map(receive).collect(),
        })
    }
}

impl Collective for PairwiseAlltoall {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        if let Some(own) = self.own.take() {
            own.copy();
        }
        loop {
            let mut moved = poll_all(&mut self.receives, PEERS, transport)?;
            moved |= poll_all(&mut self.sends, PEERS, transport)?;
            if self.sends.is_empty() && self.receives.is_empty() {
                return Ok(true);
            }
            if !moved {
                return Ok(false);
            }
        }
    }
}

/// All-to-all in few steps, for blocks whose messages take longer than their bytes (Bruck et al., "Efficient algorithms
/// for all-to-all communications in multiport message-passing systems", 1997).
///
/// ⌈log₂ n⌉ steps: a block for the rank at distance `d` goes by the powers of two that make up `d`; in step `k` a rank
/// sends all blocks that have the bit 2ᵏ left in their way, its own and those in passing, to rank + 2ᵏ in one message.
/// With blocks of `b` bytes a rank sends about ⌈log₂ n⌉ · n/2 · b bytes, and needs as much scratch memory.
pub struct BruckAlltoall {
    rank: usize,
    splits: Splits,
    output: Memory,
    tag: Tag,
    /// The block that is here and has come, or has to go, this far. The first is this rank's for itself.
    blocks: Vec<Memory>,
    /// 2ᵏ of the next step.
    bit: usize,
    /// What comes in the step under way.
    incoming: Memory,
    sending: Option<Request>,
    receiving: Option<Request>,
}

impl BruckAlltoall {
    /// Arguments and errors as for [`PairwiseAlltoall::new`].
    pub fn new(rank: usize, splits: Splits, input: Memory, output: Memory, tag: Tag) -> Result<Self> {
        splits.check(rank, &input, &output)?;
        let (size, sent) = (splits.size(), splits.sent(rank));
        let blocks = (0..size).map(|distance| input.slice(sent[(rank + distance) % size].clone())).collect();
        Ok(BruckAlltoall {
            rank,
            splits,
            output,
            tag,
            blocks,
            bit: 1,
            incoming: Memory::empty(),
            sending: None,
            receiving: None,
        })
    }

    /// The distances of the blocks that move in the step of `bit`.
    fn moving(&self, bit: usize) -> impl Iterator<Item = usize> + use<> {
        (0..self.splits.size()).filter(move |distance| distance & bit != 0)
    }

    /// The length of the block of a distance that `holder` sends in the step of `bit`: it has come as far as the lower bits of
    /// its distance.
    fn length(&self, holder: usize, distance: usize, bit: usize) -> usize {
        let size = self.splits.size();
        let origin = (holder + size - distance % bit) % size;
        self.splits.bytes(origin, (origin + distance) % size)
    }

    fn begin_step(&mut self, transport: &mut dyn Transport) -> Result<()> {
        let (size, bit) = (self.splits.size(), self.bit);
        let from = (self.rank + size - bit) % size;
        let blocks: Vec<_> = self.moving(bit).map(|distance| self.blocks[distance].clone()).collect();
        let outgoing = joined(&blocks);
        self.incoming = Memory::zeroed(self.moving(bit).map(|distance| self.length(from, distance, bit)).sum());
        self.receiving = Some(transport.recv(from, self.tag, self.incoming.clone())?);
        self.sending = Some(transport.send((self.rank + bit) % size, self.tag, outgoing)?);
        Ok(())
    }

    /// What has come takes the place of what has gone.
    fn end_step(&mut self) {
        let (size, bit) = (self.splits.size(), self.bit);
        let from = (self.rank + size - bit) % size;
        let mut at = 0;
        for distance in self.moving(bit) {
            let end = at + self.length(from, distance, bit);
            self.blocks[distance] = self.incoming.slice(at..end);
            at = end;
        }
        self.bit *= 2;
    }

    fn deliver(&mut self) {
        let (size, received) = (self.splits.size(), self.splits.received(self.rank));
        for (distance, block) in self.blocks.iter().enumerate() {
            let from = (self.rank + size - distance) % size;
            copy(block, &self.output.slice(received[from].clone()));
        }
    }
}

fn joined(blocks: &[Memory]) -> Memory {
    let all = Memory::zeroed(blocks.iter().map(Memory::len).sum());
    let spans = consecutive(blocks.iter().map(Memory::len));
    blocks.iter().zip(spans).for_each(|(block, span)| copy(block, &all.slice(span)));
    all
}

impl Collective for BruckAlltoall {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        loop {
            let under_way = self.receiving.is_some() || self.sending.is_some();
            let sent = settled(&mut self.sending, transport)?;
            let received = settled(&mut self.receiving, transport)?;
            if !(sent && received) {
                return Ok(false);
            }
            if under_way {
                self.end_step();
            }
            if self.bit >= self.splits.size() {
                self.deliver();
                return Ok(true);
            }
            self.begin_step(transport)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_say_where_blocks_lie() {
        let splits = Splits::new(&[vec![9, 2, 3], vec![1, 9, 0], vec![4, 5, 9]]).unwrap();
        assert_eq!(splits.sent(0), [0..9, 9..11, 11..14]);
        assert_eq!(splits.received(0), [0..9, 9..10, 10..14]);
        assert_eq!(splits.largest(), 5);
        assert_eq!(Splits::new(&[]).unwrap().largest(), 0);
    }

    #[test]
    fn splits_that_make_no_sense_are_refused() {
        assert!(Splits::new(&[vec![1, 2], vec![1]]).is_err());
        assert!(Splits::new(&[vec![0, usize::MAX], vec![0, 1]]).is_err());
        let splits = Splits::new(&[vec![1, 2], vec![3, 4]]).unwrap();
        assert!(splits.check(0, &Memory::zeroed(3), &Memory::zeroed(4)).is_ok());
        assert!(splits.check(0, &Memory::zeroed(3), &Memory::zeroed(5)).is_err());
        assert!(splits.check(1, &Memory::zeroed(8), &Memory::zeroed(6)).is_err());
    }
}
