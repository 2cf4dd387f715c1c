//! What is negotiated as one.

use super::backend::Backend;
use super::cache::Agreement;
use super::message::{Signature, SignatureKind, TensorSignature};
use super::submission::{Completion, OpKind, Output, Promise, Submission};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce::{ReduceOp, fill_neutral};

/// A tensor and whoever waits for it.
pub(crate) struct Item {
    pub(super) submission: Submission,
    pub(super) promise: Promise,
    /// Of an allgather that was agreed on: each rank's first dimension.
    pub(super) first_dims: Vec<usize>,
}

/// A tensor, or the tensors of a group, which are of one kind.
pub(crate) struct Entry {
    pub(super) name: String,
    pub(super) items: Vec<Item>,
}

impl Item {
    /// A tensor that nobody has seen yet.
    pub(super) fn new(submission: Submission, promise: Promise) -> Self {
        Item { submission, promise, first_dims: Vec::new() }
    }

    /// The memory that receives the result of so many bytes, made if need be.
    pub(super) fn resolve_output(&mut self, bytes: usize) -> Memory {
        let Submission { input, output, .. } = &mut self.submission;
        std::mem::replace(output, Output::InPlace).resolve(input, bytes)
    }

    /// The size of an allgather's result in bytes, or what there is of addresses.
    pub(super) fn gathered_bytes(&self) -> usize {
        let Submission { shape, dtype, .. } = &self.submission;
        let row = shape.iter().skip(1).product::<usize>() * dtype.size();
        self.first_dims.iter().fold(0, |sum: usize, rows| sum.saturating_add(rows.saturating_mul(row)))
    }

    /// Tells whoever waits.
    pub(super) fn complete(self, result: Result<Completion>) {
        let Item { submission, promise, .. } = self;
        // The handle's owner may free the memory as soon as it hears.
        drop(submission);
        promise.keep(result);
    }
}

impl Entry {
    /// What the other ranks must submit, too.
    pub(super) fn signature(&self, backend: &Backend) -> Option<Signature> {
        let place = |submission: &Submission| backend.place(submission);
        Signature::of(self.items.iter().map(|item| &item.submission), backend.size, place)
    }

    /// Of an allgather: this rank's first dimension of each tensor.
    pub(super) fn first_dims(&self) -> Vec<u64> {
        let first_dim = |item: &Item| match item.submission.kind {
            OpKind::Allgather => item.submission.shape.first().map(|&dim| dim as u64),
            _ => None,
        };
        self.items.iter().filter_map(first_dim).collect()
    }

    /// Tells whoever waits for any of the tensors.
    pub(super) fn complete(self, result: Result<Completion>) {
        self.items.into_iter().for_each(|item| item.complete(result.clone()));
    }

    /// Tells whoever waits that this rank cannot do it, and why.
    pub(super) fn refuse(self, detail: &str) {
        let error = Error::Invalid(format!("`{}`: {detail}", self.name));
        self.complete(Err(error));
    }

    /// What a rank that has joined contributes to what the others agreed on: elements that change nothing, and no rows. Nobody
    /// waits for it.
    pub(super) fn stand_in(agreement: &Agreement) -> Entry {
        let Agreement { name, signature, .. } = agreement;
        let item = |tensor: &TensorSignature| Item::new(stand_in(name, &signature.kind, tensor), Promise::new().0);
        Entry { name: name.clone(), items: signature.tensors.iter().map(item).collect() }
    }
}

fn stand_in(name: &str, kind: &SignatureKind, tensor: &TensorSignature) -> Submission {
    let dtype = tensor.dtype;
    let dims = tensor.shape.iter().map(|&dim| dim as usize);
    let shape: Vec<usize> = kind.has_free_rows().then_some(0).into_iter().chain(dims).collect();
    let input = Memory::zeroed(shape.iter().product::<usize>() * dtype.size());
    let op = match kind {
        SignatureKind::Allreduce(options) | SignatureKind::Reducescatter(options) => options.op,
        _ => ReduceOp::Sum,
    };
    // SAFETY: nobody else knows of the memory yet.
    fill_neutral(op, dtype, unsafe { input.as_mut_slice() });
    let kind = kind.unscaled();
    let output = match kind.is_in_place() {
        true => Output::InPlace,
        false => Output::Allocate(Box::new(Memory::zeroed)),
    };
    Submission::new(name, kind, dtype, shape, input, output)
}
