//! Collective operations on tensors, among the ranks that the caller names: a [`World`], or a [`ProcessSet`] of it.
//!
//! The functions of the same names in the crate's root use the global world. All ranks must call an operation with the
//! same name, kind and (except for the first dimension of [`allgather`] and [`alltoall`]) shape. Tensors may be of any of the
//! runtime's kinds, on any device, contiguous or not; those that are not contiguous or not on the CPU go through a copy.
//!
//! | name | result |
//! |---|---|
//! | `operation` | a new tensor; a backward pass goes through it (see below) |
//! | `operation_` | over the tensor itself |
//! | `operation_async`, `operation_async_` | the same, in the background, without a gradient: a handle to wait for |
//! | `grouped_operation…` | for a list of tensors, negotiated as one |
//!
//! # Gradients
//!
//! The gradient is that of the *sum of all ranks' losses*, as if one program computed all of them: what a rank's tensor
//! contributes to the results of the others comes back to it. `DistributedOptimizer` then averages over ranks, which
//! makes it the gradient of the mean loss. For an allreduce that is what Horovod does; for an allgather and a broadcast
//! Horovod divides by the number of ranks once more, and for a reducescatter it multiplies.
//!
//! A backward pass communicates: all ranks must run it through the same operations in the same order, which they do where
//! they run the same program.
//!
//! [`World`]: hvd_core::World
//! [`ProcessSet`]: hvd_core::ProcessSet

mod exchange;
mod gradient;
mod handle;
mod reduce;
mod sparse;

pub use crate::broadcast::{broadcast_optimizer_state, broadcast_parameters};
pub use exchange::{
    MessageHandle, allgather, allgather_async, alltoall, alltoall_async, broadcast, broadcast_, broadcast_async,
    broadcast_async_, grouped_allgather, grouped_allgather_async, recv_, recv_async_, send, send_async,
};
pub(crate) use handle::copy_of;
pub use handle::{GroupHandle, TensorHandle};
pub use reduce::{
    allreduce, allreduce_, allreduce_async, allreduce_async_, grouped_allreduce, grouped_allreduce_,
    grouped_allreduce_async, grouped_allreduce_async_, grouped_reducescatter, grouped_reducescatter_async,
    metric_average, reducescatter, reducescatter_async,
};
pub use sparse::{SparseHandle, sparse_allreduce, sparse_allreduce_async};
