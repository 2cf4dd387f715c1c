//! What a user hands to the engine, and what comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::collective::even_chunks;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce::ReduceOp;
use crate::wire::Compression;

/// A collective operation and its parameters.
#[derive(Clone, Debug, PartialEq)]
pub enum OpKind {
    /// Combine every rank's elements; all ranks get the result.
    Allreduce(Allreduce),
    /// All ranks get the root's elements.
    Broadcast {
        /// The rank whose elements they are.
        root: usize,
    },
    /// All ranks get all ranks' elements, one rank's after the other's. First dimensions may differ.
    Allgather,
    /// Each rank gets a block of rows from every rank.
    Alltoall {
        /// How many rows (of the first dimension) go to each rank, one after the other; together they are all rows. `None`:
        /// equally many to each.
        splits: Option<Vec<usize>>,
    },
    /// Combine every rank's elements; each rank gets its share of the rows (of the first dimension), as [`even_chunks`]
    /// cuts them: of uneven rows the first ranks get one more.
    ///
    /// [`even_chunks`]: crate::collective::even_chunks
    Reducescatter(Allreduce),
    /// Completes on no rank before every rank has submitted it.
    Barrier,
    /// This rank has no more data. Completes once all ranks have joined; until then this rank takes part in what the others
    /// submit, without contributing to it.
    Join,
}

impl OpKind {
    /// Whether the result may replace the input.
    pub(crate) fn is_in_place(&self) -> bool {
        matches!(self, OpKind::Allreduce(_) | OpKind::Broadcast { .. } | OpKind::Barrier | OpKind::Join)
    }

    /// Whether several of the kind may be submitted as one.
    pub(crate) fn can_be_grouped(&self) -> bool {
        matches!(self, OpKind::Allreduce(_) | OpKind::Allgather | OpKind::Reducescatter(_))
    }

    /// The operation's name, with its article where it is an ordinary word.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            OpKind::Allreduce(_) => "an allreduce",
            OpKind::Broadcast { .. } => "a broadcast",
            OpKind::Allgather => "an allgather",
            OpKind::Alltoall { .. } => "an alltoall",
            OpKind::Reducescatter(_) => "a reducescatter",
            OpKind::Barrier => "a barrier",
            OpKind::Join => "a join",
        }
    }
}

/// The parameters of an allreduce or a reducescatter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allreduce {
    /// How elements are combined.
    pub op: ReduceOp,
    /// Each rank's elements are multiplied by this beforehand. Floats only; 1 for none.
    pub prescale: f64,
    /// The result is multiplied by this. Floats only; 1 for none.
    pub postscale: f64,
    /// How f32 and f64 elements are narrowed on the wire.
    pub compression: Compression,
}

impl Allreduce {
    /// An allreduce with `op`, unscaled, uncompressed.
    pub fn new(op: ReduceOp) -> Self {
        Allreduce { op, prescale: 1.0, postscale: 1.0, compression: Compression::None }
    }

    /// The sum over all ranks.
    pub fn sum() -> Self {
        Allreduce::new(ReduceOp::Sum)
    }

    /// The mean over all ranks.
    pub fn average() -> Self {
        Allreduce::new(ReduceOp::Average)
    }

    /// Narrows the elements on the wire.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Multiplies each rank's elements beforehand.
    pub fn prescale(mut self, factor: f64) -> Self {
        self.prescale = factor;
        self
    }

    /// Multiplies the result.
    pub fn postscale(mut self, factor: f64) -> Self {
        self.postscale = factor;
        self
    }

    /// Refuses what is not defined for elements of `dtype`.
    fn check(&self, dtype: DType) -> std::result::Result<(), String> {
        let Allreduce { op, prescale, postscale, .. } = self;
        if !op.supports(dtype) {
            return Err(format!("{op:?} is not defined for {dtype}"));
        }
        if (*prescale != 1.0 || *postscale != 1.0) && !dtype.is_float() {
            return Err(format!("scale factors need floats, not {dtype}"));
        }
        if !prescale.is_finite() || !postscale.is_finite() {
            return Err(format!("scale factors {prescale} and {postscale} must be finite"));
        }
        Ok(())
    }
}

impl From<ReduceOp> for Allreduce {
    fn from(op: ReduceOp) -> Self {
        Allreduce::new(op)
    }
}

/// Where the result goes.
pub enum Output {
    /// Over the input.
    InPlace,
    /// Into other memory of the result's size.
    Into(Memory),
    /// Into memory that is made once its size in bytes is known. The only choice for [`OpKind::Allgather`] and
    /// [`OpKind::Alltoall`].
    Allocate(Box<dyn FnOnce(usize) -> Memory + Send>),
}

impl Output {
    /// The memory that receives a result of so many bytes.
    pub(crate) fn resolve(self, input: &Memory, bytes: usize) -> Memory {
        match self {
            Output::InPlace => input.clone(),
            Output::Into(memory) => memory,
            Output::Allocate(allocate) => allocate(bytes),
        }
    }
}

/// An operation on one named tensor, as a value: it owns or keeps alive all that it touches.
pub struct Submission {
    /// Ranks find each other's submissions by this; at most one of a name may be under way on a rank.
    pub name: String,
    /// What to do.
    pub kind: OpKind,
    /// Element type.
    pub dtype: DType,
    /// Dimensions; their product is the number of elements.
    pub shape: Vec<usize>,
    /// The elements of this rank. Must not be touched until the handle completes.
    pub input: Memory,
    /// Where the result goes.
    pub output: Output,
    /// Where input and output lie.
    pub device: Device,
}

impl Submission {
    /// An operation on memory of the host.
    pub fn new(
        name: impl Into<String>,
        kind: OpKind,
        dtype: DType,
        shape: Vec<usize>,
        input: Memory,
        output: Output,
    ) -> Self {
        Submission { name: name.into(), kind, dtype, shape, input, output, device: Device::Cpu }
    }

    /// No operation at all: what stands for a demand that has no elements.
    pub(crate) fn nothing() -> Self {
        Submission::new("", OpKind::Barrier, DType::U8, vec![0], Memory::empty(), Output::InPlace)
    }

    /// Checks what `rank` can check without the other ranks of the set, `ranks` of the world.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the tensor and what was expected.
    pub(crate) fn validate(&self, rank: usize, ranks: &[usize]) -> Result<()> {
        self.check(rank, ranks).map_err(|detail| Error::Invalid(format!("`{}`: {detail}", self.name)))
    }

    fn check(&self, rank: usize, ranks: &[usize]) -> std::result::Result<(), String> {
        let Submission { kind, dtype, shape, input, .. } = self;
        // No product of some dimensions may overflow either, also where another is 0.
        let rows_fit = shape.iter().try_fold(dtype.size(), |bytes, &dim| bytes.checked_mul(dim.max(1))).is_some();
        if !rows_fit || shape.iter().product::<usize>() * dtype.size() != input.len() {
            return Err(format!("shape {shape:?} of {dtype} does not take the {} bytes given", input.len()));
        }
        if shape.is_empty() && self.has_rows() {
            return Err(format!("a scalar has no rows for {}; give it the shape [1]", kind.name()));
        }
        match kind {
            OpKind::Allreduce(options) | OpKind::Reducescatter(options) => options.check(*dtype)?,
            OpKind::Broadcast { root } if !ranks.contains(root) => {
                return Err(format!("root {root} is none of the ranks {ranks:?}"));
            }
            OpKind::Alltoall { splits: Some(splits) } if splits.len() != ranks.len() => {
                return Err(format!("{} splits for {} ranks", splits.len(), ranks.len()));
            }
            _ => {}
        }
        if let OpKind::Reducescatter(Allreduce { op: ReduceOp::Adasum, .. }) = kind {
            return Err("Adasum is a matter of whole tensors; use an allreduce".into());
        }
        self.check_output(rank, ranks)
    }

    fn check_output(&self, rank: usize, ranks: &[usize]) -> std::result::Result<(), String> {
        let expected = match &self.kind {
            kind if kind.is_in_place() => self.input.len(),
            OpKind::Reducescatter(_) => {
                let position = ranks.iter().position(|&member| member == rank).unwrap_or(0);
                let row_bytes = self.shape[1..].iter().product::<usize>() * self.dtype.size();
                even_chunks(self.shape[0], ranks.len())[position].len() * row_bytes
            }
            kind if matches!(self.output, Output::Into(_)) => {
                return Err(format!("{} allocates its output", kind.name()));
            }
            _ => 0,
        };
        match &self.output {
            Output::InPlace if !self.kind.is_in_place() => Err(format!("{} is not in place", self.kind.name())),
            Output::Into(output) if output.len() != expected => {
                Err(format!("the output has {} bytes, the result {expected}", output.len()))
            }
            _ => Ok(()),
        }
    }

    /// Whether the first dimension counts rows, which the operation hands out.
    fn has_rows(&self) -> bool {
        matches!(self.kind, OpKind::Allgather | OpKind::Alltoall { .. } | OpKind::Reducescatter(_))
    }
}

/// What a completed operation gives.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The result.
    pub output: Memory,
    /// For an allgather or alltoall, how many rows of the output come from each rank, by rank; else empty.
    pub first_dims: Vec<usize>,
    /// Of a join, the last rank of the world that joined; of a process set that was made, its number; else 0.
    pub number: usize,
    /// Of a process set that was made: whether its ranks share memory.
    pub(crate) shares: bool,
}

impl Completion {
    /// Elements.
    pub(crate) fn new(output: Memory) -> Self {
        Completion { output, first_dims: Vec::new(), number: 0, shares: false }
    }

    /// A number.
    pub(crate) fn answer(number: usize) -> Self {
        Completion { number, ..Completion::new(Memory::empty()) }
    }
}

/// The shared end of an operation: the engine writes it once, the handle reads it.
#[derive(Default)]
pub(crate) struct Outcome {
    done: AtomicBool,
    result: Mutex<Option<Result<Completion>>>,
    changed: Condvar,
}

impl Outcome {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn set(&self, result: Result<Completion>) {
        let mut slot = self.result.lock();
        *slot = Some(result);
        self.done.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Sleeps until the operation is done.
    pub(crate) fn block(&self) {
        self.changed.wait_while(&mut self.result.lock(), |slot| slot.is_none() && !self.is_done());
    }

    pub(crate) fn take(&self) -> Result<Completion> {
        let taken = self.result.lock().take();
        taken.unwrap_or_else(|| Err(Error::Invalid("the result of this operation was taken before".into())))
    }
}

/// The engine's duty to end an operation. Dropped unkept, it ends the operation with an error, so that nobody waits in vain.
pub(crate) struct Promise(Arc<Outcome>);

impl Promise {
    /// A promise and what it promises.
    pub(crate) fn new() -> (Self, Arc<Outcome>) {
        let outcome = Outcome::new();
        (Promise(outcome.clone()), outcome)
    }

    pub(crate) fn keep(self, result: Result<Completion>) {
        self.0.set(result);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if !self.0.is_done() {
            self.0.set(Err(Error::ShutDown("the operation was abandoned".into())));
        }
    }
}
