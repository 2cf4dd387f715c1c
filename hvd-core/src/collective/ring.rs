//! Ring algorithms: each rank sends to its successor and receives from its predecessor only, in segments, so that
//! sending, receiving and reducing overlap.

use std::ops::Range;

use super::relay::{Path, Relay};
use super::{Collective, Feed, Reduction, segments};
use crate::error::Result;
use crate::memory::Memory;
use crate::transport::{Tag, Transport};

/// Cuts `elements` into `size` consecutive ranges whose lengths differ by at most one.
pub fn even_chunks(elements: usize, size: usize) -> Vec<Range<usize>> {
    let (each, longer) = (elements / size, elements % size);
    let start = |index: usize| index * each + index.min(longer);
    (0..size).map(|index| start(index)..start(index + 1)).collect()
}

/// The segments of the chunks that pass through a rank, and where each of these chunks begins in that list.
struct Walk {
    segments: Vec<Range<usize>>,
    starts: Vec<usize>,
}

impl Walk {
    /// The chunks `first`, `first - 1` and so on round the ring, `steps` of them.
    fn new(chunks: &[Range<usize>], first: usize, steps: usize, element_bytes: usize, segment_bytes: usize) -> Self {
        let mut walk = Walk { segments: Vec::new(), starts: vec![0] };
        let size = chunks.len();
        for step in 0..steps {
            let chunk = &chunks[(first + 2 * size - step % size) % size];
            let bytes = chunk.start * element_bytes..chunk.end * element_bytes;
            walk.segments.extend(segments(bytes, segment_bytes, element_bytes));
            walk.starts.push(walk.segments.len());
        }
        walk
    }
}

/// Sum (or another reduction) over all ranks, left on all of them: a reduce-scatter, then an all-gather.
///
/// 2(n-1) steps; a rank sends and receives 2(n-1)/n of the buffer. In the first n-1 steps chunk `c` starts on rank
/// `c + 1` and goes round to rank `c`, each rank combining its own share with what has come; rank `c` finishes it
/// (Average, scale). In the other n-1 steps the result goes round. So the order of summation of an element depends on
/// its chunk's index and the number of ranks alone, and all ranks hold the bytes that the chunk's owner rounded.
///
/// Up to eight segments of scratch memory.
pub struct RingAllreduce(Relay);

impl RingAllreduce {
    /// Reduces `buffer` in place. `chunks`, one per rank, in elements, cover it; they, the reduction and the segment's
    /// size must be the same on all ranks.
    ///
    /// # Panics
    /// If the chunks are not as many as the ranks, or do not lie in the buffer.
    pub fn new(
        rank: usize,
        size: usize,
        buffer: Memory,
        chunks: Vec<Range<usize>>,
        reduction: Reduction,
        tag: Tag,
        segment_bytes: usize,
    ) -> Self {
        let element_bytes = reduction.dtype.size();
        check(rank, size, &chunks, buffer.len() / element_bytes);
        let walk = Walk::new(&chunks, rank + size - 1, 2 * size - 1, element_bytes, segment_bytes);
        let path = Path {
            own: walk.starts[1],
            finished: walk.starts[size - 1],
            reduced: walk.starts[size],
            kept: walk.starts[2 * size - 2],
            segments: walk.segments,
        };
        RingAllreduce(Relay::new(rank, size, buffer, path, Some(reduction), tag))
    }

    /// Says that what the buffers hold was combined from `ranks` ranks in all, by which Average divides.
    pub fn over_ranks(mut self, ranks: usize) -> Self {
        self.0.ranks = ranks;
        self
    }

    /// Has `feed`, if there is one, fill the buffer and take the results, segment by segment while others travel.
    pub fn fed_by(mut self, feed: Option<Box<dyn Feed>>) -> Self {
        self.0.feed = feed;
        self
    }
}

/// The first half of [`RingAllreduce`]: afterwards chunk `rank` of the buffer holds its result, and the other chunks
/// partial sums of no use.
///
/// n-1 steps; a rank sends and receives (n-1)/n of the buffer. Up to eight segments of scratch memory.
pub struct RingReduceScatter(Relay);

impl RingReduceScatter {
    /// Arguments as for [`RingAllreduce::new`].
    ///
    /// # Panics
    /// As [`RingAllreduce::new`].
    pub fn new(
        rank: usize,
        size: usize,
        buffer: Memory,
        chunks: Vec<Range<usize>>,
        reduction: Reduction,
        tag: Tag,
        segment_bytes: usize,
    ) -> Self {
        let element_bytes = reduction.dtype.size();
        check(rank, size, &chunks, buffer.len() / element_bytes);
        let walk = Walk::new(&chunks, rank + size - 1, size, element_bytes, segment_bytes);
        let path = Path {
            own: walk.starts[1],
            finished: walk.starts[size - 1],
            reduced: walk.starts[size],
            kept: walk.starts[size - 1],
            segments: walk.segments,
        };
        RingReduceScatter(Relay::new(rank, size, buffer, path, Some(reduction), tag))
    }
}

/// Every rank's part, on every rank. The parts may differ in length.
///
/// n-1 steps; a rank sends all parts but its successor's and receives all but its own. No scratch memory.
pub struct Allgather(Relay);

impl Allgather {
    /// Fills `output`, in which this rank's part is in place already. `ranges`, one per rank, are in bytes and disjoint;
    /// they and the segment's size must be the same on all ranks.
    ///
    /// # Panics
    /// If the ranges are not as many as the ranks, or do not lie in the buffer.
    pub fn new(
        rank: usize,
        size: usize,
        output: Memory,
        ranges: Vec<Range<usize>>,
        tag: Tag,
        segment_bytes: usize,
    ) -> Self {
        check(rank, size, &ranges, output.len());
        let walk = Walk::new(&ranges, rank + size, size, 1, segment_bytes);
        let own = walk.starts[1];
        let path = Path { own, finished: own, reduced: own, kept: walk.starts[size - 1], segments: walk.segments };
        Allgather(Relay::new(rank, size, output, path, None, tag))
    }
}

fn check(rank: usize, size: usize, chunks: &[Range<usize>], len: usize) {
    assert!(rank < size, "rank {rank} of {size}");
    assert_eq!(chunks.len(), size, "chunks for {size} ranks");
    for chunk in chunks {
        assert!(chunk.start <= chunk.end && chunk.end <= len, "chunk {chunk:?} of {len}");
    }
}

macro_rules! relayed {
    ($($name:ident),*) => {$(
        impl Collective for $name {
            fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
                self.0.poll(transport)
            }
        }
    )*};
}

relayed!(RingAllreduce, RingReduceScatter, Allgather);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_even_and_cover() {
        assert_eq!(even_chunks(7, 3), [0..3, 3..5, 5..7]);
        assert_eq!(even_chunks(2, 4), [0..1, 1..2, 2..2, 2..2]);
        assert_eq!(even_chunks(0, 2), [0..0, 0..0]);
    }

    #[test]
    fn a_walk_goes_down_the_ring_in_whole_elements() {
        let walk = Walk::new(&[0..3, 3..5, 5..5], 1, 4, 4, 11);
        assert_eq!(walk.segments, [12..20, 0..8, 8..12, 12..20]);
        assert_eq!(walk.starts, [0, 1, 3, 3, 4]);
    }
}
