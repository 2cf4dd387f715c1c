//! Reduce-scatter by direct exchange.

use std::collections::VecDeque;
use std::ops::Range;

use super::pipe::{Pipe, poll_all};
use super::{Collective, Reduction, segments};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce;
use crate::transport::{Request, Tag, Transport};

/// Pieces of this rank's chunk that are being received at a time.
const PIECES: usize = 2;

/// Scratch memory for all peers together, in segments; but no piece is smaller than [`LEAST_PIECE_BYTES`] for it.
const SCRATCH_SEGMENTS: usize = 8;
const LEAST_PIECE_BYTES: usize = 4 << 10;

/// Each rank's chunk of the combined elements, on that rank.
///
/// Every rank sends each other one its share of that one's chunk, rank + 1 first, and combines what comes for its own,
/// piece by piece, in the order of ranks. One step, of n-1 messages at once; a rank sends and receives (n-1)/n of the
/// buffer, as around a ring, but partial sums do not travel: an f16 is rounded once, and the bits are those of shared
/// memory. The input stays as it is.
///
/// Eight segments of scratch memory, or 8 KiB per rank if that is more.
pub struct Reducescatter {
    rank: usize,
    size: usize,
    own: Memory,
    output: Memory,
    reduction: Reduction,
    tag: Tag,
    sends: VecDeque<Pipe>,
    /// This rank's chunk, cut, in bytes.
    pieces: Vec<Range<usize>>,
    slot_bytes: usize,
    /// [`PIECES`] times a slot for each rank.
    scratch: Memory,
    /// Pieces before this one are being received.
    posted: usize,
    /// Pieces before this one are combined.
    combined: usize,
    receives: VecDeque<Vec<Request>>,
}

impl Reducescatter {
    /// Combines chunk `rank` of every rank's `input` into `output`, which must not overlap. `chunks`, one per rank, are in
    /// elements; they, the reduction and the segment's size must be the same on all ranks.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the chunks do not lie in the input, or the output is not as long as this rank's.
    pub fn new(
        rank: usize,
        input: &Memory,
        output: Memory,
        chunks: &[Range<usize>],
        reduction: Reduction,
        tag: Tag,
        segment_bytes: usize,
    ) -> Result<Self> {
        let (size, element_bytes) = (chunks.len(), reduction.dtype.size());
        let chunks = chunk_bytes(rank, input, &output, chunks, element_bytes)?;
        let piece_bytes = piece_bytes(size, segment_bytes);
        let send = |peer: usize| Pipe::to(peer, &input.slice(chunks[peer].clone()), tag, piece_bytes, element_bytes);
        let pieces: Vec<_> = segments(0..output.len(), piece_bytes, element_bytes).collect();
        let slot_bytes = pieces.first().map_or(0, Range::len);
        Ok(Reducescatter {
            rank,
            size,
            own: input.slice(chunks[rank].clone()),
            output,
            reduction,
            tag,
            sends: (1..size).map(|step| send((rank + step) % size)).collect(),
            scratch: Memory::zeroed(PIECES.min(pieces.len()) * size * slot_bytes),
            pieces,
            slot_bytes,
            posted: 0,
            combined: 0,
            receives: VecDeque::new(),
        })
    }

    /// Where the piece of a rank arrives.
    fn slot(&self, piece: usize, rank: usize) -> Memory {
        let start = (piece % PIECES * self.size + rank) * self.slot_bytes;
        self.scratch.slice(start..start + self.pieces[piece].len())
    }

    fn post(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let before = self.posted;
        while self.posted < self.pieces.len() && self.receives.len() < PIECES {
            let peers = (1..self.size).map(|step| (self.rank + self.size - step) % self.size);
            let receives: Result<_> =
                peers.map(|peer| transport.recv(peer, self.tag, self.slot(self.posted, peer))).collect();
            self.receives.push_back(receives?);
            self.posted += 1;
        }
        Ok(self.posted > before)
    }

    /// Combines the oldest piece if all of it has come.
    fn take(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let Some(oldest) = self.receives.front_mut() else { return Ok(false) };
        while let Some(&request) = oldest.last() {
            if !transport.test(request)? {
                return Ok(false);
            }
            oldest.pop();
        }
        self.receives.pop_front();
        self.combine(self.combined);
        self.combined += 1;
        Ok(true)
    }

    fn combine(&self, piece: usize) {
        let range = self.pieces[piece].clone();
        let shares: Vec<_> = (0..self.size)
            .map(|rank| if rank == self.rank { self.own.slice(range.clone()) } else { self.slot(piece, rank) })
            .collect();
        let Reduction { op, dtype, scale } = self.reduction;
        // SAFETY: the receives of this piece are complete and the next ones into its slots are not posted; the output is
        // this operation's and overlaps nothing.
        unsafe {
            let shares: Vec<_> = shares.iter().map(|share| share.as_slice()).collect();
            reduce::combine(op, dtype, self.output.slice(range).as_mut_slice(), &shares, scale);
        }
    }
}

/// The chunks in bytes.
fn chunk_bytes(
    rank: usize,
    input: &Memory,
    output: &Memory,
    chunks: &[Range<usize>],
    element_bytes: usize,
) -> Result<Vec<Range<usize>>> {
    let elements = input.len() / element_bytes;
    let fits = |chunk: &Range<usize>| chunk.start <= chunk.end && chunk.end <= elements;
    let own = chunks.get(rank).filter(|_| chunks.iter().all(fits)).map(|chunk| chunk.len() * element_bytes);
    if own != Some(output.len()) {
        let (input, output) = (input.len(), output.len());
        return Err(Error::Invalid(format!(
            "reducescatter of {input} into {output} bytes, chunks {chunks:?} of {element_bytes} bytes an element"
        )));
    }
    Ok(chunks.iter().map(|chunk| chunk.start * element_bytes..chunk.end * element_bytes).collect())
}

/// Bytes of a piece: a segment, or less where so many ranks' pieces would take too much scratch memory.
fn piece_bytes(size: usize, segment_bytes: usize) -> usize {
    let share = segment_bytes.saturating_mul(SCRATCH_SEGMENTS) / (PIECES * size);
    share.max(LEAST_PIECE_BYTES).min(segment_bytes)
}

impl Collective for Reducescatter {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        loop {
            let mut moved = self.post(transport)?;
            moved |= poll_all(&mut self.sends, usize::MAX, transport)?;
            moved |= self.take(transport)?;
            if self.combined == self.pieces.len() && self.sends.is_empty() {
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
    use super::piece_bytes;

    #[test]
    fn scratch_memory_stays_bounded() {
        assert_eq!(piece_bytes(2, 256 << 10), 256 << 10);
        assert_eq!(piece_bytes(16, 256 << 10), 64 << 10);
        assert_eq!(piece_bytes(4096, 256 << 10), 4 << 10);
        assert_eq!(piece_bytes(8, 100), 100);
    }
}
