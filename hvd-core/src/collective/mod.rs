//! Algorithms over a transport, each a resumable operation: it is polled and never blocks, so that several can be in
//! flight.

use crate::error::Result;
use crate::transport::Transport;

pub use crate::reduce::Reduction;

/// An operation under way on this rank.
pub trait Collective: Send {
    /// Goes on as far as it can without waiting. `true` when this rank's part is done and its memory is at rest;
    /// afterwards it must not be called again. Between calls somebody must drive [`Transport::progress`].
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool>;
}
