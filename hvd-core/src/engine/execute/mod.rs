//! One batch on its way: copied in, moved, copied out.

mod allgather;
mod allreduce;
mod alltoall;
mod broadcast;
mod reducescatter;

use super::Observers;
use super::backend::Backend;
use super::entry::Item;
use super::fusion::{Batch, Route};
use super::message::SignatureKind;
use super::observe::Phase;
use super::submission::Completion;
use crate::collective::Collective;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::Transport;
use crate::wire;

/// A batch under way.
pub struct Execution {
    items: Vec<Item>,
    route: Route,
    operation: Box<dyn Operation>,
}

/// The part of a batch that differs from one kind of operation to another.
trait Operation: Send {
    /// Goes on without waiting; `true` when nothing moves any more.
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool>;

    /// Whether there are collectives still to be made: until then no other may be, as all ranks make them in one order.
    fn is_preparing(&self) -> bool {
        false
    }

    /// Copies out what has moved.
    fn finish(self: Box<Self>) -> Finished;
}

/// What an operation leaves.
#[derive(Default)]
struct Finished {
    /// The result for each tensor.
    outputs: Vec<Memory>,
    /// How many rows of each tensor's result come from each rank; empty where that is nobody's question.
    first_dims: Vec<Vec<usize>>,
    /// A buffer for the next batch.
    buffer: Option<Memory>,
}

/// An operation whose collective is known from the start.
struct Simple<C> {
    collective: C,
    /// Copies out.
    finish: Box<dyn FnOnce() -> Finished + Send>,
}

impl<C: Collective + 'static> Simple<C> {
    /// `finish` runs when nothing moves any more.
    fn operation(collective: C, finish: impl FnOnce() -> Finished + Send + 'static) -> Box<dyn Operation> {
        Box::new(Simple { collective, finish: Box::new(finish) })
    }
}

impl<C: Collective> Operation for Simple<C> {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.collective.poll(transport)
    }

    fn finish(self: Box<Self>) -> Finished {
        // The collective lets go of the memory before anybody hears that it is done.
        drop(self.collective);
        (self.finish)()
    }
}

/// Nothing has to move: the negotiation was all.
struct Agreed;

impl Operation for Agreed {
    fn poll(&mut self, _: &mut dyn Transport) -> Result<bool> {
        Ok(true)
    }

    fn finish(self: Box<Self>) -> Finished {
        Finished { outputs: vec![Memory::empty()], ..Finished::default() }
    }
}

impl Collective for Box<dyn Collective> {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        (**self).poll(transport)
    }
}

impl Execution {
    /// Copies in what has to be, and prepares the collective.
    pub fn start(mut batch: Batch, backend: &mut Backend, observers: &Observers) -> Result<Self> {
        observers.tell_all(&batch.items, Phase::CopyIn);
        let started = match batch.kind {
            SignatureKind::Allreduce(_) => allreduce::start(&mut batch, backend),
            SignatureKind::Broadcast { root } => broadcast::start(root as usize, &mut batch, backend),
            SignatureKind::Allgather => allgather::start(&mut batch, backend),
            SignatureKind::Alltoall | SignatureKind::UnfitAlltoall { .. } => alltoall::start(&mut batch, backend),
            SignatureKind::Reducescatter(_) => reducescatter::start(&mut batch, backend),
            SignatureKind::Barrier => Ok(Box::new(Agreed) as Box<dyn Operation>),
        };
        let Batch { route, items, .. } = batch;
        match started {
            Ok(operation) => {
                observers.tell_all(&items, Phase::Wire);
                Ok(Execution { items, route, operation })
            }
            Err(error) => {
                items.into_iter().for_each(|item| item.complete(Err(error.clone())));
                Err(error)
            }
        }
    }

    /// Names and bytes of the tensors.
    pub fn tensors(&self) -> Vec<(String, usize)> {
        let tensor = |item: &Item| (item.submission.name.clone(), item.submission.input.len());
        self.items.iter().map(tensor).collect()
    }

    /// How this batch moves. What moves through shared memory must keep its order.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Whether nothing else may be started yet.
    pub fn is_preparing(&self) -> bool {
        self.operation.is_preparing()
    }

    /// Goes on without waiting; `true` when nothing moves any more.
    pub fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        self.operation.poll(transport)
    }

    /// Copies out and completes every tensor. Gives the buffer back for the next batch.
    pub fn finish(self, observers: &Observers) -> Option<Memory> {
        let Execution { items, operation, .. } = self;
        observers.tell_all(&items, Phase::CopyOut);
        let Finished { outputs, first_dims, buffer } = operation.finish();
        let first_dims = first_dims.into_iter().map(Some).chain(std::iter::repeat(None));
        for ((item, output), first_dims) in items.into_iter().zip(outputs).zip(first_dims) {
            observers.tell(&item.submission.name, Phase::Done);
            item.complete(Ok(Completion { first_dims: first_dims.unwrap_or_default(), ..Completion::new(output) }));
        }
        buffer
    }

    /// Ends every tensor with an error.
    pub fn fail(self, error: &Error) {
        drop(self.operation);
        self.items.into_iter().for_each(|item| item.complete(Err(error.clone())));
    }
}

/// What the items contribute.
fn inputs(items: &[Item]) -> Vec<Memory> {
    items.iter().map(|item| item.submission.input.clone()).collect()
}

/// Copies all bytes unless both are the same memory.
pub(super) fn copy_bytes(from: &Memory, to: &Memory) {
    if from.as_ptr() != to.as_ptr() {
        // SAFETY: the operation owns both until it completes, and distinct memories of one submission do not overlap.
        unsafe { wire::convert(DType::U8, from.as_slice(), DType::U8, to.as_mut_slice(), 1.0) };
    }
}
