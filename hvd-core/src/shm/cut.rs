//! How an allreduce's tensors are cut into pieces, shares and runs: arithmetic only.

use std::ops::Range;

/// Up to so many bytes over all ranks' slots together, every rank combines the whole payload itself.
pub const DIRECT_BYTES: usize = 32 << 10;

/// A payload is cut into at least this many pieces, so that phases of different ranks overlap ...
const MIN_PIECES: usize = 4;
/// ... unless they would become smaller than this.
const MIN_PIECE_BYTES: usize = 32 << 10;
/// Shares of a piece begin at a multiple of this, so that no two ranks write to one cache line.
const LINE: usize = 64;

/// Bytes of a piece of a payload of so many bytes.
pub(super) fn piece_bytes(payload_bytes: usize, slot_bytes: usize) -> usize {
    payload_bytes.div_ceil(MIN_PIECES).max(MIN_PIECE_BYTES).next_multiple_of(LINE).min(slot_bytes)
}

/// The stream of elements that the parts form when one follows the other.
pub(super) struct Cut {
    /// Where each part begins, and where the last ends.
    starts: Vec<usize>,
    /// Bytes of an element in the parts and in the slots.
    user: usize,
    wire: usize,
    /// Elements of a piece; the last has fewer.
    piece: usize,
    ranks: usize,
}

/// A run of elements within one part.
#[derive(Debug, PartialEq)]
pub(super) struct Run {
    pub part: usize,
    /// Bytes in the part.
    pub user: Range<usize>,
    /// Bytes in the slot.
    pub wire: Range<usize>,
}

impl Cut {
    /// `user` and `wire` are the sizes of an element in bytes.
    pub fn new(parts: impl Iterator<Item = usize>, user: usize, wire: usize, ranks: usize, slot_bytes: usize) -> Cut {
        let mut cut = Cut::of_pieces(parts, wire, ranks, slot_bytes);
        cut.user = user;
        cut.piece = piece_bytes(cut.bytes(), slot_bytes) / wire;
        cut
    }

    /// Pieces of up to `piece_bytes` of elements of `size` bytes, which do not change on their way.
    pub fn of_pieces(parts: impl Iterator<Item = usize>, size: usize, ranks: usize, piece_bytes: usize) -> Cut {
        let mut starts = vec![0usize];
        starts.extend(parts.scan(0usize, |sum, elements| {
            *sum = sum.saturating_add(elements);
            Some(*sum)
        }));
        Cut { starts, user: size, wire: size, piece: piece_bytes / size, ranks }
    }

    /// Whether the payload is so small that every rank had better combine all of it.
    pub fn is_direct(&self) -> bool {
        self.bytes().saturating_mul(self.ranks) <= DIRECT_BYTES && self.pieces() <= 1
    }

    pub fn pieces(&self) -> u64 {
        self.elements().div_ceil(self.piece) as u64
    }

    /// The elements of a piece.
    pub fn span(&self, index: u64) -> Range<usize> {
        let start = (index as usize).saturating_mul(self.piece);
        start..start.saturating_add(self.piece).min(self.elements())
    }

    /// The elements of a piece that `rank` reduces.
    pub fn share(&self, index: u64, rank: usize) -> Range<usize> {
        let span = self.span(index);
        let share = span.len().div_ceil(self.ranks).next_multiple_of((LINE / self.wire).max(1));
        let at = |rank: usize| span.start + rank.saturating_mul(share).min(span.len());
        at(rank)..at(rank + 1)
    }

    /// Cuts elements of a piece where a part ends, and into runs of at most `most` bytes of the wire's type.
    pub fn runs(&self, index: u64, elements: Range<usize>, most: usize) -> impl Iterator<Item = Run> {
        let Cut { user, wire, .. } = *self;
        let (starts, base, most) = (&self.starts, self.span(index).start, (most / wire).max(1));
        let mut part = starts.partition_point(|&start| start <= elements.start).saturating_sub(1);
        let mut at = elements.start;
        std::iter::from_fn(move || {
            if at >= elements.end {
                return None;
            }
            while starts[part + 1] <= at {
                part += 1;
            }
            let end = elements.end.min(starts[part + 1]).min(at.saturating_add(most));
            let within = (at - starts[part]) * user..(end - starts[part]) * user;
            let run = Run { part, user: within, wire: (at - base) * wire..(end - base) * wire };
            at = end;
            Some(run)
        })
    }

    fn elements(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    fn bytes(&self) -> usize {
        self.elements().saturating_mul(self.wire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_runs_cover_every_element_once() {
        for (parts, ranks, slot_bytes) in [
            (vec![5, 0, 0, 1, 300, 0, 64], 3, 64),
            (vec![0, 0], 2, 64),
            (vec![100_000], 7, 4096),
            (vec![1; 50], 2, 1 << 17),
        ] {
            let cut = Cut::new(parts.iter().copied(), 8, 2, ranks, slot_bytes);
            let mut next = vec![0; parts.len()];
            for index in 0..cut.pieces() {
                let mut wire = 0;
                for run in (0..ranks).flat_map(|rank| cut.runs(index, cut.share(index, rank), 40)) {
                    assert!(run.wire.len() <= 40 && run.wire.len() * 4 == run.user.len());
                    assert_eq!((run.wire.start, run.user.start), (wire, next[run.part]));
                    (wire, next[run.part]) = (run.wire.end, run.user.end);
                }
                assert!(wire <= slot_bytes);
            }
            let ends: Vec<_> = parts.iter().map(|elements| elements * 8).collect();
            assert_eq!(next, ends);
        }
    }

    #[test]
    fn a_small_payload_is_one_piece() {
        let cut = Cut::new([1000].into_iter(), 4, 4, 2, 1 << 17);
        assert!(cut.is_direct());
        assert!(!Cut::new([1000].into_iter(), 4, 4, 2, 64).is_direct());
        assert!(!Cut::new([10_000].into_iter(), 4, 4, 2, 1 << 17).is_direct());
    }
}
