//! The buffer in which tensors travel together.
//!
//! For a ring the layout is chunk-major: chunk *c* of the buffer holds part *c* of every tensor, so that an element's chunk,
//! and with it the order of its summation, depends on its own tensor alone and not on its neighbours.

use std::ops::Range;
use std::sync::Arc;

use super::execute::copy_bytes;
use crate::collective::{Feed, even_chunks};
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
    copies: Option<Arc<Copies>>,
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
    /// What lies where, without a gap from the buffer's first element to its last.
    pieces: Vec<Piece>,
    /// The buffer's memory as it was lent.
    lent: Memory,
}

/// A part of one tensor.
struct Piece {
    tensor: usize,
    /// Its first element in the tensor.
    start: usize,
    /// Its place in the buffer, in elements.
    place: Range<usize>,
}

/// Copies tensors into the buffer and out of it, whole or piece by piece.
struct Courier {
    copies: Arc<Copies>,
    buffer: Memory,
    inputs: Vec<Memory>,
    outputs: Vec<Memory>,
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
        let buffer = lent.slice(0..bytes);
        let (pieces, chunks) = layout(&parts);
        let copies = Arc::new(Copies { conversion, pieces, lent });
        Staging { buffer, wire: conversion.wire, chunks, copies: Some(copies) }
    }

    /// Fills the buffer.
    pub fn copy_in(&self, inputs: &[Memory]) {
        if let Some(mut courier) = self.courier(inputs.to_vec(), Vec::new()) {
            courier.fill(0..self.buffer.len());
        }
    }

    /// What fills the buffer, and takes the results, piece by piece; `None` where the tensor travels in its output.
    pub fn feed(&self, inputs: Vec<Memory>, outputs: Vec<Memory>) -> Option<Box<dyn Feed>> {
        self.courier(inputs, outputs).map(|courier| Box::new(courier) as Box<dyn Feed>)
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
        self.copies.map(|copies| copies.lent.clone())
    }

    /// Puts the result where the user wants it; gives the buffer back for the next batch.
    pub fn copy_out(self, outputs: &[Memory]) -> Option<Memory> {
        if let Some(mut courier) = self.courier(Vec::new(), outputs.to_vec()) {
            courier.drain(0..self.buffer.len());
        }
        self.into_buffer()
    }

    fn courier(&self, inputs: Vec<Memory>, outputs: Vec<Memory>) -> Option<Courier> {
        let copies = self.copies.clone()?;
        Some(Courier { copies, buffer: self.buffer.clone(), inputs, outputs })
    }
}

impl Feed for Courier {
    fn fill(&mut self, bytes: Range<usize>) {
        let Conversion { user, wire, prescale, .. } = self.copies.conversion;
        self.copies.for_each_piece(bytes, |tensor, at_tensor, at_buffer| {
            let (from, to) = (self.inputs[tensor].slice(at_tensor), self.buffer.slice(at_buffer));
            // SAFETY: the operation owns its inputs until it completes, and these bytes of the buffer do not travel yet.
            unsafe { wire::convert(user, from.as_slice(), wire, to.as_mut_slice(), prescale) };
        });
    }

    fn drain(&mut self, bytes: Range<usize>) {
        let Conversion { user, wire, postscale, .. } = self.copies.conversion;
        self.copies.for_each_piece(bytes, |tensor, at_tensor, at_buffer| {
            let (from, to) = (self.buffer.slice(at_buffer), self.outputs[tensor].slice(at_tensor));
            // SAFETY: these bytes hold results, which nobody changes; their input has been read, and the handles are not
            // complete yet: nobody else uses the memory.
            unsafe { wire::convert(wire, from.as_slice(), user, to.as_mut_slice(), postscale) };
        });
    }
}

impl Copies {
    /// Calls `copy(tensor, bytes of the tensor, bytes of the buffer)` for all that lies in these bytes of the buffer.
    fn for_each_piece(&self, bytes: Range<usize>, copy: impl Fn(usize, Range<usize>, Range<usize>)) {
        let Conversion { user, wire, .. } = self.conversion;
        let (start, end) = (bytes.start / wire.size(), bytes.end / wire.size());
        let first = self.pieces.partition_point(|piece| piece.place.end <= start);
        for piece in self.pieces[first..].iter().take_while(|piece| piece.place.start < end) {
            let place = piece.place.start.max(start)..piece.place.end.min(end);
            let at = piece.start + place.start - piece.place.start;
            let at_tensor = at * user.size()..(at + place.len()) * user.size();
            copy(piece.tensor, at_tensor, place.start * wire.size()..place.end * wire.size());
        }
    }
}

/// Where the `parts` of tensors, as many of each, lie in the buffer, and the chunks that they make.
fn layout(parts: &[Vec<Range<usize>>]) -> (Vec<Piece>, Vec<Range<usize>>) {
    let count = parts.first().map_or(0, Vec::len);
    let (mut pieces, mut chunks, mut at) = (Vec::new(), Vec::with_capacity(count), 0);
    for chunk in 0..count {
        let start = at;
        for (tensor, parts) in parts.iter().enumerate() {
            let part = &parts[chunk];
            pieces.push(Piece { tensor, start: part.start, place: at..at + part.len() });
            at += part.len();
        }
        chunks.push(start..at);
    }
    (pieces, chunks)
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
