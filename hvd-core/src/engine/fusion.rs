//! Which of the tensors that are ready travel together.

use super::entry::Item;
use super::message::SignatureKind;
use crate::dtype::DType;

/// How a tensor travels. Depends on the tensor alone, so that its sum has the same bits with and without neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Nowhere: it lies in memory that the ranks share.
    InPlace,
    /// Through the memory that the ranks share.
    Shared,
    /// Recursive doubling over the transport.
    Doubling,
    /// A ring over the transport.
    Ring,
    /// Within each host through the memory that its ranks share, between hosts in rings.
    Hierarchical,
}

impl Route {
    /// Whether nothing goes over the transport.
    pub fn is_shared(self) -> bool {
        matches!(self, Route::InPlace | Route::Shared)
    }

    /// Whether memory that ranks share is used, which such operations do in one order.
    pub fn keeps_order(self) -> bool {
        self.is_shared() || self == Route::Hierarchical
    }
}

/// Tensors of a gathered size above this travel alone, in bytes: to copy them into a buffer and back takes longer than a
/// message of their own.
const GATHER_FUSION_LIMIT_BYTES: usize = 1 << 20;

/// A tensor that is ready.
pub struct Ready {
    /// What is to be done with it.
    pub kind: SignatureKind,
    /// How it travels.
    pub route: Route,
    /// How many ranks have something to contribute.
    pub contributors: usize,
    /// The tensor.
    pub item: Item,
}

/// Tensors that travel as one, all of one kind and type.
pub struct Batch {
    /// What is to be done with them.
    pub kind: SignatureKind,
    /// How they travel.
    pub route: Route,
    /// How many ranks have something to contribute; the others have joined.
    pub contributors: usize,
    /// Large messages are cut into pieces of this size: the setting at the time of the plan, the same on all ranks.
    pub segment_bytes: usize,
    /// The tensors, in agreed order.
    pub items: Vec<Item>,
    dtype: DType,
    bytes: usize,
}

impl Ready {
    /// What the tensor takes in a batch, in bytes. `None` where it travels alone.
    fn fusible_bytes(&self) -> Option<usize> {
        let bytes = self.item.submission.input.len();
        match self.kind {
            SignatureKind::Allreduce(_) | SignatureKind::Reducescatter(_) => Some(bytes),
            SignatureKind::Allgather => {
                Some(self.item.gathered_bytes()).filter(|&bytes| bytes <= GATHER_FUSION_LIMIT_BYTES)
            }
            _ => None,
        }
    }
}

impl Batch {
    fn takes(&self, ready: &Ready, bytes: usize, threshold_bytes: usize) -> bool {
        let same = self.kind == ready.kind && self.dtype == ready.item.submission.dtype && self.route == ready.route;
        let same = same && self.contributors == ready.contributors;
        same && self.bytes.saturating_add(bytes) <= threshold_bytes
    }
}

/// Sorts what is ready into batches of up to `threshold_bytes`, looking past tensors that do not fit together. The order of
/// batches is that of their first tensors.
pub fn plan(ready: impl IntoIterator<Item = Ready>, threshold_bytes: usize, segment_bytes: usize) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for ready in ready {
        let bytes = ready.fusible_bytes();
        let mate = bytes.and_then(|bytes| batches.iter_mut().find(|batch| batch.takes(&ready, bytes, threshold_bytes)));
        let Ready { kind, route, contributors, item } = ready;
        match mate {
            Some(batch) => {
                batch.bytes += bytes.unwrap_or(0);
                batch.items.push(item);
            }
            None => {
                let (dtype, bytes) = (item.submission.dtype, bytes.unwrap_or(usize::MAX));
                batches.push(Batch { kind, route, contributors, segment_bytes, items: vec![item], dtype, bytes });
            }
        }
    }
    batches
}
