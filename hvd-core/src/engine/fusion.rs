//! Which of the tensors that are ready travel together.

use super::Item;
use super::message::{Signature, SignatureKind};
use super::submission::{Completion, Output, Submission};
use crate::error::Result;
use crate::memory::Memory;

/// How a tensor travels. Depends on the tensor alone, so that its sum has the same bits with and without neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Through the memory that the ranks share.
    Shared,
    /// Recursive doubling over the transport.
    Doubling,
    /// A ring over the transport.
    Ring,
}

/// Tensors that travel as one, all with the same signature but for their shapes.
pub struct Batch {
    /// What each of them is.
    pub signature: Signature,
    /// How they travel.
    pub route: Route,
    /// Large messages are cut into pieces of this size: the setting at the time of the plan, the same on all ranks.
    pub segment_bytes: usize,
    /// The tensors, in agreed order.
    pub items: Vec<Item>,
    bytes: usize,
}

impl Batch {
    fn takes(&self, signature: &Signature, route: Route, bytes: usize, threshold_bytes: usize) -> bool {
        let fusible = matches!(signature.kind, SignatureKind::Allreduce { .. });
        let same = self.signature.kind == signature.kind && self.signature.dtype == signature.dtype;
        fusible && same && self.route == route && self.bytes.saturating_add(bytes) <= threshold_bytes
    }
}

/// Sorts what is ready into batches of up to `threshold_bytes`, looking past tensors that do not fit together. The order of
/// batches is that of their first tensors.
pub fn plan(ready: Vec<(Signature, Route, Item)>, threshold_bytes: usize, segment_bytes: usize) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for (signature, route, item) in ready {
        let bytes = item.submission.input.len();
        match batches.iter_mut().find(|batch| batch.takes(&signature, route, bytes, threshold_bytes)) {
            Some(batch) => {
                batch.bytes += bytes;
                batch.items.push(item);
            }
            None => batches.push(Batch { signature, route, segment_bytes, items: vec![item], bytes }),
        }
    }
    batches
}

impl Item {
    /// The memory that receives the result, made if need be.
    pub(super) fn resolve_output(submission: &mut Submission, bytes: usize) -> Memory {
        match std::mem::replace(&mut submission.output, Output::InPlace) {
            Output::InPlace => submission.input.clone(),
            Output::Into(memory) => memory,
            Output::Allocate(allocate) => allocate(bytes),
        }
    }

    /// Tells whoever waits.
    pub(super) fn complete(self, result: Result<Completion>) {
        let Item { submission, promise } = self;
        // The handle's owner may free the memory as soon as it hears.
        drop(submission);
        promise.keep(result);
    }
}
