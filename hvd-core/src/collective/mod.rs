//! Algorithms over a transport, each a resumable operation: it is polled and never blocks, so that several can be in
//! flight.

use crate::dtype::DType;
use crate::error::Result;
use crate::reduce::ReduceOp;
use crate::transport::Transport;

/// What an allreduce does to each element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reduction {
    /// Element type of the buffer, as it travels.
    pub dtype: DType,
    /// How elements are combined. `Average` of integers floors; `Average` of floats divides by the number of ranks.
    pub op: ReduceOp,
    /// Floats are multiplied by this once they are combined, before the chunk's owner rounds them. 1 for none.
    pub scale: f64,
}

/// An operation under way on this rank.
pub trait Collective: Send {
    /// Goes on as far as it can without waiting. `true` when this rank's part is done and its memory is at rest;
    /// afterwards it must not be called again. Between calls somebody must drive [`Transport::progress`].
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool>;
}
