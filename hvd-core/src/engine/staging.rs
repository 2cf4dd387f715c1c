//! The buffer in which tensors travel together.
//!
//! For a ring the layout is chunk-major: chunk *c* of the buffer holds part *c* of every tensor, so that an element's chunk,
//! and with it the order of its summation, depends on its own tensor alone and not on its neighbours.

use std::ops::Range;

use super::execute::copy_bytes;
use crate::collective::even_chunks;
use crate::dtype::DType;
use crate::memory::Memory;
use crate::wire;

/// Tensors in the form in which they travel.
pub struct Staging {
    buffer: Memory,
    /// Element type in the buffer.
    wire: DType,
    /// Each rank's chunk, in elements.
    chunks: Vec<Range<usize>>,
    /// `None` where the tensor travels in its output.
    copies: Option<Copies>,
}

/// How elements are converted on their way into the buffer and out of it.
#[derive(Clone, Copy)]
pub struct Conversion {
    /// Element type of the tensors.
    pub user: DType,
    /// Element type in the buffer.
    pub wire: DType,
    /// Elements are multiplied by this on the way in.
    pub prescale: f64,
    /// And by this on the way out.
    pub postscale: f64,
}

/// How tensors lie in the buffer.
struct Copies {
    conversion: Conversion,
    /// The parts of each tensor, one for each chunk, in elements.
    parts: Vec<Vec<Range<usize>>>,
    /// The buffer's memory as it was lent.
    lent: Memory,
}

impl Conversion {
    /// None at all.
    pub fn none(dtype: DType) -> Self {
        Conversion { user: dtype, wire: dtype, prescale: 1.0, postscale: 1.0 }
    }
}

impl Staging {
    /// One tensor that travels as it is, in its output. `parts`: the number of chunks.
    pub fn in_place(input: &Memory, output: &Memory, dtype: DType, parts: usize) -> Self {
        copy_bytes(input, output);
        let chunks = even_chunks(output.len() / dtype.size(), parts);
        Staging { buffer: output.clone(), wire: dtype, chunks, copies: None }
    }

    /// A buffer, in `lent` if that is large enough, for tensors whose `parts`, as many of each, go into its chunks.
    pub fn new(parts: Vec<Vec<Range<usize>>>, conversion: Conversion, lent: Option<Memory>) -> Self {
        let elements: usize = parts.iter().flatten().map(Range::len).sum();
        let bytes = elements * conversion.wire.size();
        let lent = lent.filter(|memory| memory.len() >= bytes).unwrap_or_else(|| Memory::zeroed(bytes));
        let copies = Copies { conversion, parts, lent };
        let (buffer, chunks) = (copies.lent.slice(0..bytes), copies.chunks());
        Staging { buffer, wire: conversion.wire, chunks, copies: Some(copies) }
    }

    /// Fills the buffer.
    pub fn copy_in(&self, inputs: &[Memory]) {
        let Some(Copies { conversion: Conversion { user, wire, prescale, .. }, .. }) = self.copies else { return };
        self.for_each_part(|tensor, at_tensor, at_buffer| {
            let (from, to) = (inputs[tensor].slice(at_tensor), self.buffer.slice(at_buffer));
            // SAFETY: the operation owns its inputs and the buffer until it completes.
            unsafe { wire::convert(user, from.as_slice(), wire, to.as_mut_slice(), prescale) };
        });
    }

    /// The memory in which the tensors travel.
    pub fn buffer(&self) -> Memory {
        self.buffer.clone()
    }

    /// Each rank's chunk, in elements.
    pub fn chunks(&self) -> Vec<Range<usize>> {
        self.chunks.clone()
    }

    /// A rank's chunk.
    pub fn chunk(&self, rank: usize) -> Memory {
        let Range { start, end } = self.chunks[rank];
        self.buffer.slice(start * self.wire.size()..end * self.wire.size())
    }

    /// The buffer, for the next batch.
    pub fn into_buffer(self) -> Option<Memory> {
        self.copies.map(|copies| copies.lent)
    }

    /// Puts the result where the user wants it; gives the buffer back for the next batch.
    pub fn copy_out(self, outputs: &[Memory]) -> Option<Memory> {
        let Conversion { user, wire, postscale, .. } = self.copies.as_ref()?.conversion;
        self.for_each_part(|tensor, at_tensor, at_buffer| {
            let (from, to) = (self.buffer.slice(at_buffer), outputs[tensor].slice(at_tensor));
            // SAFETY: the collective is done and the handles are not complete yet: nobody else uses the memory.
            unsafe { wire::convert(wire, from.as_slice(), user, to.as_mut_slice(), postscale) };
        });
        self.into_buffer()
    }

    /// Calls `copy(tensor, bytes of the tensor, bytes of the buffer)` for every part, in the buffer's order.
    fn for_each_part(&self, mut copy: impl FnMut(usize, Range<usize>, Range<usize>)) {
        let Some(Copies { conversion: Conversion { user, wire, .. }, parts, .. }) = &self.copies else { return };
        for (chunk, span) in self.chunks.iter().enumerate() {
            let mut at = span.start;
            for (tensor, parts) in parts.iter().enumerate() {
                let part = &parts[chunk];
                let end = at + part.len();
                copy(tensor, part.start * user.size()..part.end * user.size(), at * wire.size()..end * wire.size());
                at = end;
            }
        }
    }
}

impl Copies {
    fn chunks(&self) -> Vec<Range<usize>> {
        let count = self.parts.first().map_or(0, Vec::len);
        consecutive((0..count).map(|chunk| self.parts.iter().map(|parts| parts[chunk].len()).sum()))
    }
}

/// Spans of the given lengths, one after the other.
pub fn consecutive(lengths: impl IntoIterator<Item = usize>) -> Vec<Range<usize>> {
    let mut end = 0;
    let span = |length: usize| {
        let start = end;
        end += length;
        start..end
    };
    lengths.into_iter().map(span).collect()
}
