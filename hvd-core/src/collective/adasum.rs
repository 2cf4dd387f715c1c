//! Adasum: a sum that adapts to how much the ranks' gradients agree.

use std::ops::Range;

use super::pipe::Pipe;
use super::{Collective, even_chunks};
use crate::dtype::DType;
use crate::error::Result;
use crate::memory::Memory;
use crate::reduce::{Products, blend};
use crate::transport::{Tag, Transport};

/// Adasum over all ranks, left on all of them (Maleki et al., "Scaling distributed training with adaptive summation",
/// 2020), tensor by tensor.
///
/// Of two vectors it makes `(1 - a·b / 2|a|²) a + (1 - a·b / 2|b|²) b`, with the inner products of each tensor in f64.
/// With p the greatest power of two not above n: each rank from p on gives its vector to rank - p, which combines it with
/// its own. Then in log₂ p levels, ranks whose numbers differ in one bit, the lowest first, exchange halves of what they
/// hold; each combines the half that it keeps, for which the 2ᵏ ranks that hold the pieces of the same two vectors add up
/// their inner products by recursive doubling. Then the halves go back, and the ranks from p on get the result.
///
/// log₂ p · (log₂ p + 5)/2 steps, and 2 more if n is no power of two. A rank below p sends 2(p-1)/p · B bytes, and B more
/// if it serves another one; besides, for each tensor, 24 bytes in each of the log₂ p · (log₂ p + 1)/2 steps of
/// the sums. Half of the buffer as scratch memory, or all of it on a rank that serves another one.
///
/// The bits of a tensor's result do not depend on the tensors beside it.
pub struct AdasumAllreduce {
    rank: usize,
    size: usize,
    /// The greatest power of two that is not above `size`: also the number of chunks.
    core: usize,
    dtype: DType,
    buffer: Memory,
    layout: Layout,
    tag: Tag,
    segment_bytes: usize,
    /// Chunks that this rank holds.
    held: Range<usize>,
    /// Where the peer's share of them arrives.
    incoming: Memory,
    /// The inner products for each tensor, added up so far, and where the peer's arrive.
    products: Vec<Products>,
    arriving: Memory,
    stage: Stage,
    sending: Option<Pipe>,
    receiving: Option<Pipe>,
}

/// What the transfers under way belong to.
#[derive(Clone, Copy)]
enum Stage {
    Start,
    /// A rank of the core takes in the vector of one outside.
    FoldIn,
    /// Halves go to and from the rank whose number differs in this bit.
    Halve(usize),
    /// Inner products of that level go to and from the rank whose number differs in the second bit.
    Add(usize, usize),
    /// Results of halves go to and from the rank whose number differs in this bit.
    Double(usize),
    /// A rank outside the core gives its vector.
    GiveIn,
    /// A rank outside gets the result, or one of the core gives it.
    FoldOut,
    Done,
}

/// Where the parts of the tensors lie: chunk `c` of the buffer holds part `c` of every tensor.
struct Layout {
    /// For each chunk, the elements of each tensor.
    parts: Vec<Vec<Range<usize>>>,
    element_bytes: usize,
}

impl Layout {
    fn new(lengths: &[usize], chunks: usize, element_bytes: usize) -> Self {
        let cuts: Vec<_> = lengths.iter().map(|&length| even_chunks(length, chunks)).collect();
        let mut end = 0;
        let mut part = |cut: &Vec<Range<usize>>, chunk: usize| {
            let start = end;
            end += cut[chunk].len();
            start..end
        };
        let parts = (0..chunks).map(|chunk| cuts.iter().map(|cut| part(cut, chunk)).collect()).collect();
        Layout { parts, element_bytes }
    }

    /// The bytes of some chunks.
    fn bytes(&self, chunks: Range<usize>) -> Range<usize> {
        let parts = self.parts[chunks].iter().flatten();
        let (first, last) = (parts.clone().next(), parts.last());
        let ends = first.zip(last).map_or(0..0, |(first, last)| first.start..last.end);
        ends.start * self.element_bytes..ends.end * self.element_bytes
    }

    /// Each tensor's bytes in a chunk.
    fn tensors(&self, chunk: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let bytes = |part: &Range<usize>| part.start * self.element_bytes..part.end * self.element_bytes;
        self.parts[chunk].iter().map(bytes).enumerate()
    }
}

impl AdasumAllreduce {
    /// Combines the tensors in `buffer`, in place, of `lengths` elements. The buffer is cut into [`AdasumAllreduce::chunks`]
    /// chunks, of which chunk `c` holds part `c` of every tensor, as [`even_chunks`] cuts it; so a single tensor lies in it
    /// as it is. Lengths, type and the segment's size must be the same on all ranks.
    ///
    /// # Panics
    /// If there is no such rank, the buffer has not as many elements as the tensors, or they are no floats.
    pub fn new(
        rank: usize,
        size: usize,
        buffer: Memory,
        lengths: &[usize],
        dtype: DType,
        tag: Tag,
        segment_bytes: usize,
    ) -> Self {
        assert!(rank < size, "rank {rank} of {size}");
        assert!(dtype.is_float(), "Adasum of {dtype} is not defined");
        assert_eq!(buffer.len(), lengths.iter().sum::<usize>() * dtype.size(), "bytes of {lengths:?} {dtype}");
        let core = Self::chunks(size);
        let folds = rank + core < size;
        let layout = Layout::new(lengths, core, dtype.size());
        let half = layout.bytes(0..core / 2).len();
        let scratch = if folds {
            buffer.len()
        } else if core > 1 && rank < core {
            half
        } else {
            0
        };
        AdasumAllreduce {
            rank,
            size,
            core,
            dtype,
            layout,
            tag,
            segment_bytes,
            held: 0..core,
            incoming: Memory::zeroed(scratch),
            products: vec![Products::default(); lengths.len()],
            arriving: Memory::zeroed(lengths.len() * size_of::<[f64; 3]>()),
            stage: if buffer.is_empty() { Stage::Done } else { Stage::Start },
            buffer,
            sending: None,
            receiving: None,
        }
    }

    /// Into how many chunks the buffer is cut among `size` ranks.
    pub fn chunks(size: usize) -> usize {
        1 << size.ilog2()
    }

    /// Takes in what has arrived and begins the next stage.
    fn advance(&mut self) -> Stage {
        match self.stage {
            Stage::Start if self.rank >= self.core => {
                self.send(self.rank - self.core, self.buffer.clone());
                Stage::GiveIn
            }
            Stage::Start if self.rank + self.core < self.size => {
                self.receive(self.rank + self.core, self.incoming.clone());
                Stage::FoldIn
            }
            Stage::Start => self.halve(1),
            Stage::FoldIn => {
                self.multiply(true);
                self.blend(true);
                self.halve(1)
            }
            Stage::Halve(level) => {
                self.multiply(self.leads(level));
                self.add(level, 1)
            }
            Stage::Add(level, bit) => {
                self.add_arrived();
                self.add(level, bit << 1)
            }
            Stage::Double(level) => {
                self.held = self.before(level);
                self.double(level >> 1)
            }
            Stage::GiveIn => {
                self.receive(self.rank - self.core, self.buffer.clone());
                Stage::FoldOut
            }
            Stage::FoldOut | Stage::Done => Stage::Done,
        }
    }

    /// Whether this rank's vector is the first of the two that a level combines.
    fn leads(&self, level: usize) -> bool {
        self.rank & level == 0
    }

    /// The chunks that this rank holds before a level: at each level before, it has kept a half of them.
    fn before(&self, level: usize) -> Range<usize> {
        let keep = |held: Range<usize>, bit: u32| {
            let middle = held.start + held.len() / 2;
            if self.leads(1 << bit) { held.start..middle } else { middle..held.end }
        };
        (0..level.ilog2()).fold(0..self.core, keep)
    }

    fn halve(&mut self, level: usize) -> Stage {
        if level == self.core {
            return self.double(level >> 1);
        }
        let (held, kept) = (self.held.clone(), self.before(level << 1));
        let given = if kept.start == held.start { kept.end..held.end } else { held.start..kept.start };
        self.send(self.rank ^ level, self.buffer.slice(self.layout.bytes(given)));
        self.receive(self.rank ^ level, self.incoming.slice(0..self.layout.bytes(kept.clone()).len()));
        self.held = kept;
        Stage::Halve(level)
    }

    /// Exchanges inner products with one rank after the other of those that hold pieces of the same two vectors; after the
    /// last, combines the vectors.
    fn add(&mut self, level: usize, bit: usize) -> Stage {
        if bit > level {
            self.blend(self.leads(level));
            return self.halve(level << 1);
        }
        let own: Vec<f64> = self.products.iter().flat_map(|sum| [sum.cross, sum.first, sum.second]).collect();
        self.send(self.rank ^ bit, Memory::from_vec(own));
        self.receive(self.rank ^ bit, self.arriving.clone());
        Stage::Add(level, bit)
    }

    fn double(&mut self, level: usize) -> Stage {
        if level == 0 {
            return self.give_back();
        }
        let (held, all) = (self.held.clone(), self.before(level));
        let missing = if held.start == all.start { held.end..all.end } else { all.start..held.start };
        self.send(self.rank ^ level, self.buffer.slice(self.layout.bytes(held)));
        self.receive(self.rank ^ level, self.buffer.slice(self.layout.bytes(missing)));
        Stage::Double(level)
    }

    fn give_back(&mut self) -> Stage {
        if self.rank + self.core >= self.size {
            return Stage::Done;
        }
        self.send(self.rank + self.core, self.buffer.clone());
        Stage::FoldOut
    }

    /// The inner products of what is held and what has come. `leads`: what is held is the first.
    fn multiply(&mut self, leads: bool) {
        let start = self.layout.bytes(self.held.clone()).start;
        self.products.fill(Products::default());
        for chunk in self.held.clone() {
            for (tensor, range) in self.layout.tensors(chunk) {
                let arrived = self.incoming.slice(range.start - start..range.end - start);
                // SAFETY: no transfer is under way, and both are this operation's.
                let (own, other) = unsafe { (self.buffer.as_slice(), arrived.as_slice()) };
                let own = &own[range];
                let (first, second) = if leads { (own, other) } else { (other, own) };
                self.products[tensor] = self.products[tensor].plus(Products::of(self.dtype, first, second));
            }
        }
    }

    /// Adds the peer's inner products. Addition commutes, so all who add the same two get the same bits.
    fn add_arrived(&mut self) {
        // SAFETY: no transfer is under way.
        let arrived = unsafe { self.arriving.as_slice() };
        for (sum, bytes) in self.products.iter_mut().zip(arrived.chunks_exact(size_of::<[f64; 3]>())) {
            let [cross, first, second] = bytemuck::pod_read_unaligned(bytes);
            *sum = sum.plus(Products { cross, first, second });
        }
    }

    /// Combines what has come with what is held.
    fn blend(&mut self, leads: bool) {
        let start = self.layout.bytes(self.held.clone()).start;
        for chunk in self.held.clone() {
            for (tensor, range) in self.layout.tensors(chunk) {
                let (first, second) = self.products[tensor].factors();
                let arrived = self.incoming.slice(range.start - start..range.end - start);
                let own = self.buffer.slice(range);
                // SAFETY: no transfer is under way, both are this operation's and do not overlap.
                let (own, other) = unsafe { (own.as_mut_slice(), arrived.as_slice()) };
                blend(self.dtype, own, other, if leads { (first, second) } else { (second, first) });
            }
        }
    }

    fn send(&mut self, peer: usize, memory: Memory) {
        self.sending = Some(Pipe::to(peer, &memory, self.tag, self.segment_bytes, 1));
    }

    fn receive(&mut self, peer: usize, memory: Memory) {
        self.receiving = Some(Pipe::from(peer, &memory, self.tag, self.segment_bytes, 1));
    }
}

/// Moves a transfer on; forgets it when it is done. `true` if none is left.
fn moved_out(pipe: &mut Option<Pipe>, transport: &mut dyn Transport) -> Result<bool> {
    if let Some(under_way) = pipe {
        while under_way.poll(transport)? {}
        if under_way.is_done() {
            *pipe = None;
        }
    }
    Ok(pipe.is_none())
}

impl Collective for AdasumAllreduce {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        loop {
            // Both are polled each time: neither may starve the other.
            let sent = moved_out(&mut self.sending, transport)?;
            let received = moved_out(&mut self.receiving, transport)?;
            if !(sent && received) {
                return Ok(false);
            }
            if matches!(self.stage, Stage::Done) {
                return Ok(true);
            }
            self.stage = self.advance();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_a_part_of_every_tensor() {
        let layout = Layout::new(&[5, 0, 3], 2, 4);
        assert_eq!(layout.parts, [[0..3, 3..3, 3..5], [5..7, 7..7, 7..8]]);
        assert_eq!(layout.bytes(0..1), 0..20);
        assert_eq!(layout.bytes(1..2), 20..32);
        assert_eq!(layout.bytes(0..2), 0..32);
        assert_eq!(layout.bytes(1..1), 0..0);
    }
}
