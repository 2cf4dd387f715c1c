//! What a user hands to the engine, and what comes back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce::ReduceOp;
use crate::wire::Compression;

/// A collective operation and its parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// Completes on no rank before every rank has submitted it.
    Barrier,
}

/// The parameters of an allreduce.
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
    /// Into other memory of the same size.
    Into(Memory),
    /// Into memory that is made once its size in bytes is known. The only choice for [`OpKind::Allgather`].
    Allocate(Box<dyn FnOnce(usize) -> Memory + Send>),
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
}

impl Submission {
    /// Checks what can be checked without the other ranks.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the tensor and what was expected.
    pub(crate) fn validate(&self, size: usize) -> Result<()> {
        let invalid = |detail: String| Err(Error::Invalid(format!("`{}`: {detail}", self.name)));
        let bytes = self.shape.iter().try_fold(self.dtype.size(), |bytes, &dim| bytes.checked_mul(dim));
        if bytes != Some(self.input.len()) {
            let Submission { shape, dtype, input, .. } = self;
            return invalid(format!("shape {shape:?} of {dtype} does not take the {} bytes given", input.len()));
        }
        if let Output::Into(output) = &self.output
            && output.len() != self.input.len()
        {
            return invalid(format!("the output has {} bytes, the input {}", output.len(), self.input.len()));
        }
        match self.kind {
            OpKind::Allreduce(options) => self.validate_allreduce(options),
            OpKind::Broadcast { root } if root >= size => {
                invalid(format!("root {root} is not a rank of a world of {size}"))
            }
            OpKind::Allgather if self.shape.is_empty() => {
                invalid("a scalar can't be gathered; give it the shape [1]".into())
            }
            OpKind::Allgather if !matches!(self.output, Output::Allocate(_)) => {
                invalid("an allgather allocates its output".into())
            }
            _ => Ok(()),
        }
    }

    fn validate_allreduce(&self, options: Allreduce) -> Result<()> {
        let Submission { name, dtype, .. } = self;
        let Allreduce { op, prescale, postscale, .. } = options;
        if !op.supports(*dtype) {
            return Err(Error::Invalid(format!("`{name}`: {op:?} is not defined for {dtype}")));
        }
        let scaled = prescale != 1.0 || postscale != 1.0;
        if scaled && !dtype.is_float() {
            return Err(Error::Invalid(format!("`{name}`: scale factors need floats, not {dtype}")));
        }
        if !prescale.is_finite() || !postscale.is_finite() {
            return Err(Error::Invalid(format!("`{name}`: scale factors {prescale} and {postscale} must be finite")));
        }
        Ok(())
    }
}

/// What a completed operation gives.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The result.
    pub output: Memory,
    /// For an allgather, each rank's first dimension; else empty.
    pub first_dims: Vec<usize>,
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
        let mut slot = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(result);
        self.done.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Sleeps until the operation is done.
    pub(crate) fn block(&self) {
        let slot = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(slot, |slot| slot.is_none() && !self.is_done()));
    }

    pub(crate) fn take(&self) -> Result<Completion> {
        let taken = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
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
