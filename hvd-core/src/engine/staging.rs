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
    /// Each rank's chunk, in elements.
    chunks: Vec<Range<usize>>,
    /// `None` where the tensor travels in its output.
    copies: Option<Copies>,
}

/// How tensors lie in the buffer, and how elements are converted on the way.
struct Copies {
    user: DType,
    wire: DType,
    postscale: f64,
    /// Elements of each tensor.
    lengths: Vec<usize>,
    /// The buffer's memory as it was lent.
    lent: Memory,
}

impl Staging {
    /// One tensor that travels as it is, in its output. `parts`: the number of chunks.
    pub fn in_place(input: &Memory, output: &Memory, dtype: DType, parts: usize) -> Self {
        copy_bytes(input, output);
        let chunks = even_chunks(output.len() / dtype.size(), parts);
        Staging { buffer: output.clone(), chunks, copies: None }
    }

    /// Tensors that are converted to `wire`, times `prescale`, into a buffer made of `lent` if that is large enough.
    pub fn copy_in(
        inputs: &[Memory],
        user: DType,
        wire: DType,
        prescale: f64,
        postscale: f64,
        parts: usize,
        lent: Option<Memory>,
    ) -> Self {
        let lengths: Vec<_> = inputs.iter().map(|input| input.len() / user.size()).collect();
        let bytes = lengths.iter().sum::<usize>() * wire.size();
        let lent = lent.filter(|memory| memory.len() >= bytes).unwrap_or_else(|| Memory::zeroed(bytes));
        let copies = Copies { user, wire, postscale, lengths, lent };
        let buffer = copies.lent.slice(0..bytes);
        let chunks = copies.for_each_piece(parts, |tensor, at_tensor, at_buffer| {
            let (from, to) = (inputs[tensor].slice(at_tensor), buffer.slice(at_buffer));
            // SAFETY: the operation owns its inputs and the buffer until it completes.
            unsafe { wire::convert(user, from.as_slice(), wire, to.as_mut_slice(), prescale) };
        });
        Staging { buffer, chunks, copies: Some(copies) }
    }

    /// The memory in which the tensors travel.
    pub fn buffer(&self) -> Memory {
        self.buffer.clone()
    }

    /// Each rank's chunk, in elements.
    pub fn chunks(&self) -> Vec<Range<usize>> {
        self.chunks.clone()
    }

    /// Puts the result where the user wants it; gives the buffer back for the next batch.
    pub fn copy_out(self, outputs: &[Memory]) -> Option<Memory> {
        let Staging { buffer, chunks, copies } = self;
        let copies = copies?;
        copies.for_each_piece(chunks.len(), |tensor, at_tensor, at_buffer| {
            let (from, to) = (buffer.slice(at_buffer), outputs[tensor].slice(at_tensor));
            // SAFETY: the collective is done and the handles are not complete yet: nobody else uses the memory.
            unsafe { wire::convert(copies.wire, from.as_slice(), copies.user, to.as_mut_slice(), copies.postscale) };
        });
        Some(copies.lent)
    }
}

impl Copies {
    /// Calls `copy(tensor, bytes of the tensor, bytes of the buffer)` for every piece in the buffer's order; gives the
    /// chunks of the buffer, in elements.
    fn for_each_piece(
        &self,
        parts: usize,
        mut copy: impl FnMut(usize, Range<usize>, Range<usize>),
    ) -> Vec<Range<usize>> {
        let pieces: Vec<_> = self.lengths.iter().map(|&length| even_chunks(length, parts)).collect();
        let mut at = 0;
        let mut chunk = |part: usize| {
            let start = at;
            for (tensor, pieces) in pieces.iter().enumerate() {
                let piece = pieces[part].clone();
                let user = piece.start * self.user.size()..piece.end * self.user.size();
                copy(tensor, user, at * self.wire.size()..(at + piece.len()) * self.wire.size());
                at += piece.len();
            }
            start..at
        };
        (0..parts).map(&mut chunk).collect()
    }
}
