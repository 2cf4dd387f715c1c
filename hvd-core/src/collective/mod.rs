//! Algorithms over a transport, each a resumable operation: it is polled and never blocks, so that several can be in
//! flight.
//!
//! For `n` ranks and a buffer of `B` bytes, what one rank goes through:
//!
//! | operation | steps | bytes sent by a rank |
//! |---|---|---|
//! | [`RingAllreduce`] | 2(n-1) | 2(n-1)/n · B |
//! | [`RingReduceScatter`] | n-1 | (n-1)/n · B |
//! | [`Allgather`] | n-1 | all parts but its successor's |
//! | [`HierarchicalAllreduce`] of h hosts in p parts | 2(h-1) between hosts | 2(h-1)/(h·p) · B to other hosts |
//! | [`DoublingAllreduce`] | ⌈log₂ n⌉, up to 2 more if n is no power of two | ⌊log₂ n⌋ · B, up to B more |
//! | [`Broadcast`] | ⌈log₂ n⌉ | B per child, at most ⌈log₂ n⌉ of them |
//! | [`Reducescatter`] | 1, of n-1 messages | (n-1)/n · B |
//! | [`PairwiseAlltoall`] | n-1, eight at a time | all blocks but its own |
//! | [`BruckAlltoall`] | ⌈log₂ n⌉ | about ⌈log₂ n⌉/2 · B |
//! | [`AdasumAllreduce`] | about (log₂ n)²/2 | 2(n-1)/n · B, up to B more if n is no power of two |
//! | [`Barrier`] | ⌈log₂ n⌉ | 1 per step |
//! | [`SendTo`], [`ReceiveFrom`] | 2 | 16, then B |
//!
//! `docs/ALGORITHMS.md` says when each is chosen.
//!
//! Every operation uses one tag, which no other may use while it is under way.

mod adasum;
mod alltoall;
mod barrier;
mod broadcast;
mod doubling;
mod hierarchical;
mod hosts;
mod pair;
mod pipe;
mod places;
mod reducescatter;
mod relay;
mod ring;

use std::collections::VecDeque;
use std::time::Duration;

use crate::error::Result;
use crate::transport::{Request, Transport};

pub use crate::reduce::Reduction;
pub use adasum::AdasumAllreduce;
pub use alltoall::{BruckAlltoall, PairwiseAlltoall, Splits};
pub use barrier::Barrier;
pub use broadcast::Broadcast;
pub use doubling::DoublingAllreduce;
pub use hierarchical::HierarchicalAllreduce;
pub use hosts::{Hosts, Sharing, share};
pub use pair::{Allocate, Landing, ReceiveFrom, SendTo};
pub use places::Places;
pub use reducescatter::Reducescatter;
pub use ring::{Allgather, RingAllreduce, RingReduceScatter, even_chunks};

/// An operation under way on this rank.
pub trait Collective: Send {
    /// Goes on as far as it can without waiting. `true` when this rank's part is done and its memory is at rest;
    /// afterwards it must not be called again. Between calls somebody must drive [`Transport::progress`].
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool>;
}

/// Whoever has what is to be reduced, and wants the result, in another form than the buffer that travels. Asked piece by piece,
/// so that copying and conversion overlap with the wire.
pub trait Feed: Send {
    /// Puts this rank's elements into these bytes of the buffer. Called once for each byte, before it is read.
    fn fill(&mut self, bytes: std::ops::Range<usize>);

    /// Takes the results out of these bytes of the buffer. Called once for each byte.
    fn drain(&mut self, bytes: std::ops::Range<usize>);
}

/// How often [`run`] looks again before it sleeps.
const SPINS: u32 = 200;

/// The longest sleep of [`run`], in case a wake-up is lost.
const NAP: Duration = Duration::from_millis(100);

/// Runs one operation to its end: spins briefly while nothing moves, then sleeps on the transport's waiter.
///
/// For tests and for the time before an engine runs. Nobody else may drive the transport meanwhile.
pub fn run(operation: &mut (impl Collective + ?Sized), transport: &mut dyn Transport) -> Result<()> {
    let waiter = transport.waiter();
    let mut idle = 0;
    while !operation.poll(transport)? {
        if transport.progress()? {
            idle = 0;
        } else if idle < SPINS {
            idle += 1;
            std::hint::spin_loop();
        } else {
            waiter.wait(Some(NAP));
        }
    }
    Ok(())
}

/// Tests a request that may have been completed before; forgets it once it is. `true` if none is left.
fn settled(request: &mut Option<Request>, transport: &mut dyn Transport) -> Result<bool> {
    if let Some(pending) = *request
        && transport.test(pending)?
    {
        *request = None;
    }
    Ok(request.is_none())
}

/// Forgets the oldest requests as far as they are complete. Gives their number.
fn retire(requests: &mut VecDeque<Request>, transport: &mut dyn Transport) -> Result<usize> {
    let before = requests.len();
    while let Some(&oldest) = requests.front() {
        if !transport.test(oldest)? {
            break;
        }
        requests.pop_front();
    }
    Ok(before - requests.len())
}

/// Cuts `range` into pieces of at most `segment_bytes`, each a whole number of elements. Nothing for an empty range.
fn segments(
    range: std::ops::Range<usize>,
    segment_bytes: usize,
    element_bytes: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let step = (segment_bytes / element_bytes).max(1) * element_bytes;
    let end = range.end;
    range.step_by(step).map(move |start| start..end.min(start + step))
}
