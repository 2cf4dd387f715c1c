//! Every rank's elements combined, on all ranks.

use std::sync::Arc;

use super::{Finished, Operation, Simple, inputs};
use crate::collective::{AdasumAllreduce, Collective, DoublingAllreduce, Reduction, RingAllreduce, even_chunks};
use crate::dtype::DType;
use crate::engine::Backend;
use crate::engine::fusion::{Batch, Route};
use crate::engine::staging::{Conversion, Staging};
use crate::engine::submission::Allreduce;
use crate::error::Result;
use crate::memory::Memory;
use crate::reduce::ReduceOp;
use crate::shm::{Part, ShmAllreduce, ShmGroup, ShmInPlaceAllreduce};

/// How elements are treated from end to end.
#[derive(Clone, Copy)]
pub(super) struct Treatment {
    pub(super) conversion: Conversion,
    pub(super) reduction: Reduction,
}

impl Treatment {
    /// An average that travels in fp16 is divided before it is narrowed, or its sum might overflow. Otherwise the owner of
    /// a chunk divides and scales, with one rounding; a result that is widened afterwards is scaled then.
    pub(super) fn of(options: Allreduce, user: DType, ranks: usize, partial_sums_travel: bool) -> Self {
        let wire = options.compression.wire_dtype(user);
        let narrow = wire == DType::F16 && (user != wire || partial_sums_travel);
        let (op, prescale) = match options.op == ReduceOp::Average && narrow {
            true => (ReduceOp::Sum, options.prescale / ranks as f64),
            false => (options.op, options.prescale),
        };
        let scaled_by_owner = wire == user && op.is_elementwise();
        let (scale, postscale) = if scaled_by_owner { (options.postscale, 1.0) } else { (1.0, options.postscale) };
        let conversion = Conversion { user, wire, prescale, postscale };
        Treatment { conversion, reduction: Reduction { dtype: wire, op, scale } }
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
pub(super) fn start(options: Allreduce, batch: &mut Batch, backend: &mut Backend) -> Result<Box<dyn Operation>> {
    let Batch { items, route, segment_bytes, .. } = batch;
    let (route, segment_bytes) = (*route, *segment_bytes);
    let user = items[0].submission.dtype;
    let treatment = Treatment::of(options, user, backend.size, !route.is_shared());
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
    let Treatment { conversion: Conversion { user, prescale, postscale, .. }, reduction } = treatment;
    let part = |(input, output): (Memory, &Memory)| {
        let elements = input.len() / user.size();
        Part { input, output: output.clone(), elements }
    };
    let parts = inputs.into_iter().zip(&outputs).map(part).collect();
    let collective = ShmAllreduce::new(group, parts, user, reduction, prescale, postscale)?;
    Ok(Simple::operation(collective, || Finished { outputs, ..Finished::default() }))
}

fn over_transport(
    treatment: Treatment,
    inputs: Vec<Memory>,
    outputs: Vec<Memory>,
    (route, segment_bytes): (Route, usize),
    backend: &mut Backend,
) -> Result<Box<dyn Operation>> {
    let Treatment { conversion, reduction } = treatment;
    let chunks = match route {
        _ if !reduction.op.is_elementwise() => AdasumAllreduce::chunks(backend.size),
        Route::Ring => backend.size,
        _ => 1,
    };
    let staging = match (&inputs[..], &outputs[..]) {
        ([input], [output]) if treatment.is_plain() => Staging::in_place(input, output, conversion.user, chunks),
        _ => {
            let elements = inputs.iter().map(|input| input.len() / conversion.user.size());
            let parts = elements.map(|elements| even_chunks(elements, chunks)).collect();
            let staging = Staging::new(parts, conversion, backend.take_buffer());
            staging.copy_in(&inputs);
            staging
        }
    };
    let (rank, size, tag) = (backend.rank, backend.size, backend.next_tag());
    let (buffer, chunks) = (staging.buffer(), staging.chunks());
    let collective: Box<dyn Collective> = match route {
        _ if !reduction.op.is_elementwise() => {
            let lengths: Vec<_> = inputs.iter().map(|input| input.len() / conversion.user.size()).collect();
            Box::new(AdasumAllreduce::new(rank, size, buffer, &lengths, reduction.dtype, tag, segment_bytes))
        }
        Route::Ring => Box::new(RingAllreduce::new(rank, size, buffer, chunks, reduction, tag, segment_bytes)),
        _ => Box::new(DoublingAllreduce::new(rank, size, buffer, reduction, tag)),
    };
    Ok(Simple::operation(collective, || {
        let buffer = staging.copy_out(&outputs);
        Finished { outputs, buffer, ..Finished::default() }
    }))
}
