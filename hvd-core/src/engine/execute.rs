//! One batch on its way: copied in, reduced, copied out.

use std::ops::Range;
use std::sync::Arc;

use super::fusion::{Batch, Route};
use super::message::SignatureKind;
use super::observe::Phase;
use super::staging::Staging;
use super::submission::{Allreduce, Completion, OpKind};
use super::{Backend, Item, Observers};
use crate::collective::{Allgather, Broadcast, Collective, DoublingAllreduce, Reduction, RingAllreduce};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce::ReduceOp;
use crate::shm::{Part, ShmAllgather, ShmAllreduce, ShmBroadcast, ShmGroup};
use crate::transport::Transport;
use crate::wire;

/// A batch under way.
pub struct Execution {
    items: Vec<Item>,
    outputs: Vec<Memory>,
    route: Route,
    segment_bytes: usize,
    first_dims: Vec<usize>,
    /// `None` where there is nothing to move.
    collective: Option<Box<dyn Collective>>,
    /// Where the tensors travel, if not in their own memory.
    staging: Option<Staging>,
}

/// How the elements of an allreduce are treated from end to end.
#[derive(Clone, Copy)]
struct Treatment {
    user: DType,
    prescale: f64,
    reduction: Reduction,
    postscale: f64,
}

impl Treatment {
    /// An average that travels in fp16 is divided before it is narrowed, or its sum might overflow. Otherwise the owner of
    /// a chunk divides and scales, with one rounding; a result that is widened afterwards is scaled then.
    fn of(options: Allreduce, user: DType, ranks: usize, route: Route) -> Self {
        let wire = options.compression.wire_dtype(user);
        let partial_sums_travel = route != Route::Shared;
        let narrow = wire == DType::F16 && (user != wire || partial_sums_travel);
        let divide_first = options.op == ReduceOp::Average && narrow;
        let (op, prescale) = match divide_first {
            true => (ReduceOp::Sum, options.prescale / ranks as f64),
            false => (options.op, options.prescale),
        };
        let (scale, postscale) = if wire == user { (options.postscale, 1.0) } else { (1.0, options.postscale) };
        Treatment { user, prescale, reduction: Reduction { dtype: wire, op, scale }, postscale }
    }

    /// Whether elements travel just as the user holds them.
    fn is_plain(&self) -> bool {
        self.user == self.reduction.dtype && self.prescale == 1.0 && self.postscale == 1.0
    }
}

impl Execution {
    /// Copies in what has to be, and prepares the collective. `first_dims`: of an allgather.
    pub fn start(batch: Batch, first_dims: Vec<usize>, backend: &mut Backend, observers: &Observers) -> Result<Self> {
        let Batch { signature, route, segment_bytes, items, .. } = batch;
        let mut execution =
            Execution { items, outputs: Vec::new(), route, segment_bytes, first_dims, collective: None, staging: None };
        observers.tell_all(&execution.items, Phase::CopyIn);
        let started = match signature.kind {
            SignatureKind::Allreduce { .. } => execution.allreduce(route, backend),
            SignatureKind::Broadcast { root } => execution.broadcast(root as usize, backend),
            SignatureKind::Allgather => execution.allgather(backend),
            SignatureKind::Barrier => {
                execution.outputs.push(Memory::empty());
                Ok(())
            }
        };
        if let Err(error) = started {
            execution.fail(&error);
            return Err(error);
        }
        observers.tell_all(&execution.items, Phase::Wire);
        Ok(execution)
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

    /// Goes on without waiting; `true` when the wire part is done.
    pub fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        match &mut self.collective {
            Some(collective) => collective.poll(transport),
            None => Ok(true),
        }
    }

    /// Copies out and completes every tensor. Gives the buffer back for the next batch.
    pub fn finish(mut self, observers: &Observers) -> Option<Memory> {
        self.collective = None;
        observers.tell_all(&self.items, Phase::CopyOut);
        let buffer = self.staging.take().and_then(|staging| staging.copy_out(&self.outputs));
        for (item, output) in self.items.drain(..).zip(self.outputs.drain(..)) {
            observers.tell(&item.submission.name, Phase::Done);
            item.complete(Ok(Completion { output, first_dims: self.first_dims.clone() }));
        }
        buffer
    }

    /// Ends every tensor with an error.
    pub fn fail(mut self, error: &Error) {
        self.collective = None;
        self.staging = None;
        self.items.drain(..).for_each(|item| item.complete(Err(error.clone())));
    }

    fn allreduce(&mut self, route: Route, backend: &mut Backend) -> Result<()> {
        let treatment = self.treatment(route, backend.size);
        for item in &mut self.items {
            let bytes = item.submission.input.len();
            self.outputs.push(Item::resolve_output(&mut item.submission, bytes));
        }
        match &backend.shared {
            Some(group) => self.shared_allreduce(treatment, group.clone()),
            None => {
                self.allreduce_over_transport(treatment, route, backend);
                Ok(())
            }
        }
    }

    fn shared_allreduce(&mut self, treatment: Treatment, group: Arc<ShmGroup>) -> Result<()> {
        let Treatment { user, prescale, reduction, postscale } = treatment;
        let part = |(item, output): (&Item, &Memory)| {
            let input = item.submission.input.clone();
            Part { elements: input.len() / user.size(), input, output: output.clone() }
        };
        let parts = self.items.iter().zip(&self.outputs).map(part).collect();
        self.collective = Some(Box::new(ShmAllreduce::new(group, parts, user, reduction, prescale, postscale)?));
        Ok(())
    }

    fn allreduce_over_transport(&mut self, treatment: Treatment, route: Route, backend: &mut Backend) {
        let Treatment { user, prescale, reduction, postscale } = treatment;
        let parts = if route == Route::Ring { backend.size } else { 1 };
        let inputs: Vec<_> = self.items.iter().map(|item| item.submission.input.clone()).collect();
        let staging = match (&inputs[..], &self.outputs[..]) {
            ([input], [output]) if treatment.is_plain() => Staging::in_place(input, output, user, parts),
            _ => Staging::copy_in(&inputs, user, reduction.dtype, prescale, postscale, parts, backend.take_buffer()),
        };
        let (buffer, chunks) = (staging.buffer(), staging.chunks());
        let (rank, size, tag) = (backend.rank, backend.size, backend.next_tag());
        self.staging = Some(staging);
        self.collective = Some(match route {
            Route::Ring => Box::new(RingAllreduce::new(rank, size, buffer, chunks, reduction, tag, self.segment_bytes)),
            _ => Box::new(DoublingAllreduce::new(rank, size, buffer, reduction, tag)),
        });
    }

    fn treatment(&self, route: Route, ranks: usize) -> Treatment {
        let first = &self.items[0].submission;
        match first.kind {
            OpKind::Allreduce(options) => Treatment::of(options, first.dtype, ranks, route),
            _ => Treatment::of(Allreduce::sum(), first.dtype, ranks, route),
        }
    }

    fn broadcast(&mut self, root: usize, backend: &mut Backend) -> Result<()> {
        let submission = &mut self.items[0].submission;
        let (input, bytes) = (submission.input.clone(), submission.input.len());
        let output = Item::resolve_output(submission, bytes);
        if backend.rank == root {
            copy_bytes(&input, &output);
        }
        self.outputs.push(output.clone());
        let (rank, size, tag) = (backend.rank, backend.size, backend.next_tag());
        self.collective = Some(match &backend.shared {
            Some(group) => Box::new(ShmBroadcast::new(group.clone(), output, root)?),
            None => Box::new(Broadcast::new(rank, size, root, output, tag, self.segment_bytes)),
        });
        Ok(())
    }

    fn allgather(&mut self, backend: &mut Backend) -> Result<()> {
        let submission = &mut self.items[0].submission;
        let row: usize = submission.shape[1..].iter().product::<usize>() * submission.dtype.size();
        let sizes: Option<Vec<usize>> = self.first_dims.iter().map(|rows| rows.checked_mul(row)).collect();
        let total = sizes.as_ref().and_then(|sizes| sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size)));
        let (Some(sizes), Some(total)) = (sizes, total) else {
            return Err(Error::Invalid(format!("`{}`: the gathered size overflows", submission.name)));
        };
        let output = Item::resolve_output(submission, total);
        self.outputs.push(output.clone());
        self.collective = Some(match &backend.shared {
            Some(group) => Box::new(ShmAllgather::new(group.clone(), submission.input.clone(), output, &sizes)?),
            None => {
                let ranges = consecutive(&sizes);
                copy_bytes(&submission.input, &output.slice(ranges[backend.rank].clone()));
                let (rank, size, tag) = (backend.rank, backend.size, backend.next_tag());
                Box::new(Allgather::new(rank, size, output, ranges, tag, self.segment_bytes))
            }
        });
        Ok(())
    }
}

/// Spans of the given lengths, one after the other.
fn consecutive(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let span = |length: &usize| {
        let start = end;
        end += length;
        start..end
    };
    lengths.iter().map(span).collect()
}

/// Copies all bytes unless both are the same memory.
pub(super) fn copy_bytes(from: &Memory, to: &Memory) {
    if from.as_ptr() != to.as_ptr() {
        // SAFETY: the operation owns both until it completes, and distinct memories of one submission do not overlap.
        unsafe { wire::convert(DType::U8, from.as_slice(), DType::U8, to.as_mut_slice(), 1.0) };
    }
}
