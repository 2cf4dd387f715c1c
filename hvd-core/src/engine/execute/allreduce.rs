//! Every rank's elements combined, on all ranks.

use std::sync::Arc;

use super::{Finished, Operation, Simple, inputs};
use crate::collective::{
    AdasumAllreduce, Collective, DoublingAllreduce, HierarchicalAllreduce, Reduction, RingAllreduce, even_chunks,
};
use crate::dtype::DType;
use crate::engine::backend::Backend;
use crate::engine::fusion::{Batch, Route};
use crate::engine::staging::{Conversion, Staging};
use crate::engine::submission::{Allreduce, OpKind, Submission};
use crate::error::Result;
use crate::memory::Memory;
use crate::reduce::{self, ReduceOp};
use crate::shm::{Part, ShmAllreduce, ShmGroup, ShmInPlaceAllreduce};

/// How elements are treated from end to end.
#[derive(Clone, Copy)]
pub(super) struct Treatment {
    pub(super) conversion: Conversion,
    pub(super) reduction: Reduction,
    /// Integer sums are divided by this at the end.
    floor_by: Option<usize>,
}

impl Treatment {
    /// An average that travels in fp16 is divided before it is narrowed, or its sum might overflow. Otherwise the owner of
    /// a chunk divides and scales, with one rounding; a result that is widened afterwards is scaled then. An average over
    /// only some of the ranks, as others have joined, is a scaled sum, or, of integers, a sum that is divided at the end.
    pub(super) fn of(batch: &Batch, ranks: usize, partial_sums_travel: bool) -> Self {
        let Submission { dtype: user, kind, .. } = &batch.items[0].submission;
        // Those of this rank: what stands in for a rank that has joined is not scaled beforehand.
        let (user, mut options) = match kind {
            OpKind::Allreduce(options) | OpKind::Reducescatter(options) => (*user, *options),
            _ => (*user, Allreduce::sum()),
        };
        let wire = options.compression.wire_dtype(user);
        let narrow = wire == DType::F16 && (user != wire || partial_sums_travel);
        let (averages, contributors) = (options.op == ReduceOp::Average, batch.contributors.max(1));
        let mut floor_by = None;
        if averages && (narrow || contributors != ranks) {
            options.op = ReduceOp::Sum;
            match (user.is_float(), narrow) {
                (true, true) => options.prescale /= contributors as f64,
                (true, false) => options.postscale /= contributors as f64,
                (false, _) => floor_by = Some(contributors),
            }
        }
        let Allreduce { op, prescale, .. } = options;
        let scaled_by_owner = wire == user && op.is_elementwise();
        let (scale, postscale) = if scaled_by_owner { (options.postscale, 1.0) } else { (1.0, options.postscale) };
        let conversion = Conversion { user, wire, prescale, postscale };
        Treatment { conversion, reduction: Reduction { dtype: wire, op, scale }, floor_by }
    }

    /// What is left to do once the results are where they belong.
    pub(super) fn finish(&self, outputs: &[Memory]) {
        let Some(contributors) = self.floor_by else { return };
        let average = Reduction::new(self.conversion.user, ReduceOp::Average);
        for output in outputs {
            // SAFETY: the collective is done and the handles are not complete yet: nobody else uses the memory.
            reduce::finish(&average, contributors, unsafe { output.as_mut_slice() });
        }
    }

    /// The part between the conversions.
    pub(super) fn inside(self) -> Self {
        Treatment { conversion: Conversion::none(self.conversion.wire), ..self }
    }

    /// Whether elements travel just as the user holds them.
    pub(super) fn is_plain(&self) -> bool {
        let Conversion { user, wire, prescale, postscale } = self.conversion;
        user == wire && prescale == 1.0 && postscale == 1.0
    }
}

/// Prepares the allreduce of tensors of one type.
pub(super) fn start(batch: &mut Batch, backend: &mut Backend) -> Result<Box<dyn Operation>> {
    let (route, segment_bytes) = (batch.route, batch.segment_bytes);
    let treatment = Treatment::of(batch, backend.size, !route.is_shared());
    let items = &mut batch.items;
    let inputs = inputs(items);
    let outputs: Vec<_> = items.iter_mut().map(|item| item.resolve_output(item.submission.input.len())).collect();
    match (&backend.shared, route) {
        (Some(group), Route::InPlace) => {
            let collective = ShmInPlaceAllreduce::new(group.clone(), &outputs, treatment.reduction)?;
            Ok(Simple::operation(collective, || Finished { outputs, ..Finished::default() }))
        }
        (Some(group), Route::Shared) => in_shared_memory(treatment, inputs, outputs, group.clone()),
        _ => over_transport(treatment, inputs, outputs, (route, segment_bytes), backend),
    }
}

fn in_shared_memory(
    treatment: Treatment,
    inputs: Vec<Memory>,
    outputs: Vec<Memory>,
    group: Arc<ShmGroup>,
) -> Result<Box<dyn Operation>> {
    let Treatment { conversion: Conversion { user, prescale, postscale, .. }, reduction, .. } = treatment;
    let part = |(input, output): (Memory, &Memory)| {
        let elements = input.len() / user.size();
        Part { input, output: output.clone(), elements }
    };
    let parts = inputs.into_iter().zip(&outputs).map(part).collect();
    let collective = ShmAllreduce::new(group, parts, user, reduction, prescale, postscale)?;
    Ok(Simple::operation(collective, move || {
        treatment.finish(&outputs);
        Finished { outputs, ..Finished::default() }
    }))
}

fn over_transport(
    treatment: Treatment,
    inputs: Vec<Memory>,
    outputs: Vec<Memory>,
    (route, segment_bytes): (Route, usize),
    backend: &mut Backend,
) -> Result<Box<dyn Operation>> {
    let Treatment { conversion, reduction, .. } = treatment;
    let chunks = match route {
        _ if !reduction.op.is_elementwise() => AdasumAllreduce::chunks(backend.size),
        Route::Ring => backend.size,
        Route::Hierarchical => backend.hosts.as_ref().map_or(1, |hosts| hosts.chunks()),
        _ => 1,
    };
    let staging = staging(&treatment, &inputs, &outputs, chunks, backend);
    let (rank, size, tag) = (backend.rank, backend.size, backend.next_tag());
    let (buffer, chunks) = (staging.buffer(), staging.chunks());
    let feed = match route {
        Route::Ring if reduction.op.is_elementwise() => staging.feed(inputs.clone(), outputs.clone()),
        _ => {
            staging.copy_in(&inputs);
            None
        }
    };
    let is_fed = feed.is_some();
    let collective: Box<dyn Collective> = match (route, &backend.hosts) {
        _ if !reduction.op.is_elementwise() => {
            let lengths: Vec<_> = inputs.iter().map(|input| input.len() / conversion.user.size()).collect();
            Box::new(AdasumAllreduce::new(rank, size, buffer, &lengths, reduction.dtype, tag, segment_bytes))
        }
        (Route::Hierarchical, Some(hosts)) => {
            let hosts = hosts.clone();
            Box::new(HierarchicalAllreduce::new(hosts, size, buffer, &chunks, reduction, tag, segment_bytes)?)
        }
        (Route::Ring, _) => {
            let ring = RingAllreduce::new(rank, size, buffer, chunks, reduction, tag, segment_bytes);
            Box::new(ring.fed_by(feed))
        }
        _ => Box::new(DoublingAllreduce::new(rank, size, buffer, reduction, tag)),
    };
    Ok(Simple::operation(collective, move || {
        let buffer = if is_fed { staging.into_buffer() } else { staging.copy_out(&outputs) };
        treatment.finish(&outputs);
        Finished { outputs, buffer, ..Finished::default() }
    }))
}

/// Where the tensors travel: in their own memory, or in a buffer of so many `chunks` that is still empty.
fn staging(
    treatment: &Treatment,
    inputs: &[Memory],
    outputs: &[Memory],
    chunks: usize,
    backend: &mut Backend,
) -> Staging {
    let conversion = treatment.conversion;
    match (inputs, outputs) {
        ([input], [output]) if treatment.is_plain() => Staging::in_place(input, output, conversion.user, chunks),
        _ => {
            let elements = inputs.iter().map(|input| input.len() / conversion.user.size());
            let parts = elements.map(|elements| even_chunks(elements, chunks)).collect();
            Staging::new(parts, conversion, backend.take_buffer())
        }
    }
}
