//! Ranks of one host reduce through shared memory.
//!
//! The ranks of a [`ShmGroup`] map one anonymous memory file. Each has a *slot* in it for each of [`PIECES`] pieces in
//! flight, and a control page with three counters that only it writes. An operation streams its payload through the
//! slots piece by piece: *stage* (copy in, narrowing), *reduce* (each rank its share of the piece, over all slots in
//! rank order), *copy* (copy out, widening). The operations beside: [`ShmReducescatter`],
//! [`ShmAlltoall`], [`ShmBroadcast`], [`ShmAllgather`], [`ShmBarrier`].
//!
//! # Order
//!
//! Pieces are numbered over the whole life of the group: an operation takes the next numbers when it is made. So all
//! ranks must *make* the group's operations in one agreed order. They may be polled in any order, several at a time;
//! each phase runs in the order of the piece numbers, so that the next operation stages while this one waits for its
//! peers. A counter tells how many pieces have passed a phase on its rank. Piece `k`
//!
//! - is staged by a rank once all have copied piece `k - PIECES` out (the slot is free again);
//! - is reduced by a rank once all have staged it;
//! - is copied out by a rank once all have reduced it, or, where there is nothing to reduce, have staged it.
//!
//! Every wait is for an earlier phase or piece, so ranks that poll all that they made never wait in a circle.
//!
//! # Trust
//!
//! The peers are processes of the same user that know a nonce which only the job's own messages carry. What one writes
//! into the segment is elements (any bits will do) and counters, which are compared and never used as an index; all
//! offsets come from this rank's own description of the operation. A peer that breaks the protocol can spoil results
//! or block progress, but not make this rank touch memory outside the segment; the file is sealed against shrinking.
//!
//! # Bytes
//!
//! For a payload of `n` bytes on `p` ranks, an allreduce moves per rank: in `n·(p-1)/p` written to the own slot, `n/p`
//! read from the own buffer and each of the `p - 1` others' slots, `n/p` written to slot and buffer; out `n·(p-1)/p`
//! read and written; two waits per piece. A payload of up to [`DIRECT_BYTES`] over all ranks' slots together is
//! staged whole and combined by every rank: one wait. Broadcast and allgather: in `n`, out `n`, one wait. Reducescatter:
//! in `n·(p-1)/p`, out `n/p` read from the own input and from each other slot, `n/p` written, one wait. Alltoall: in and out
//! what a rank sends to and receives from others, one wait.

mod allreduce;
mod alltoall;
mod arena;
mod board;
mod cut;
mod form;
mod group;
mod in_place;
mod movement;
mod reducescatter;
mod segment;
mod stream;

pub use allreduce::{Part, ShmAllreduce};
pub use alltoall::ShmAlltoall;
pub use arena::{Place, ShmRegion};
pub use board::ShmBoard;
pub use cut::DIRECT_BYTES;
pub use group::ShmGroup;
pub use in_place::ShmInPlaceAllreduce;
pub use movement::{ShmAllgather, ShmBarrier, ShmBroadcast};
pub use reducescatter::ShmReducescatter;
pub use segment::PIECES;
