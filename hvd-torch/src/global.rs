//! The operations of [`crate::ops`] among all ranks of the process's one world, as Horovod's users know them.

use std::path::Path;

use hvd_core::{Allreduce, ReduceOp, world};
use tch::Tensor;

use crate::error::Result;
use crate::ops::{self, GroupHandle, MessageHandle, SparseHandle, TensorHandle};
use crate::optim::Optimizer;

macro_rules! in_the_global_world {
    ($($name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {$(
        #[doc = concat!("[`ops::", stringify!($name), "`] among all ranks of the global world.")]
        pub fn $name($($arg: $type),*) -> Result<$result> {
            let world = world()?;
            ops::$name(&world, $($arg),*)
        }
    )*};
}

in_the_global_world! {
    allreduce(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Tensor;
    allreduce_(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> ();
    allreduce_async(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> TensorHandle;
    allreduce_async_(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> TensorHandle;
    grouped_allreduce(tensors: &[&Tensor], name: &str, options: impl Into<Allreduce>) -> Vec<Tensor>;
    grouped_allreduce_(tensors: &[&Tensor], name: &str, options: impl Into<Allreduce>) -> ();
    grouped_allreduce_async(tensors: &[&Tensor], name: &str, options: impl Into<Allreduce>) -> GroupHandle;
    grouped_allreduce_async_(tensors: &[&Tensor], name: &str, options: impl Into<Allreduce>) -> GroupHandle;
    sparse_allreduce(tensor: &Tensor, name: &str, op: ReduceOp) -> Tensor;
    sparse_allreduce_async(tensor: &Tensor, name: &str, op: ReduceOp) -> SparseHandle;
    reducescatter(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Tensor;
    reducescatter_async(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> TensorHandle;
    grouped_reducescatter(tensors: &[&Tensor], name: &str, options: impl Into<Allreduce>) -> Vec<Tensor>;
    grouped_reducescatter_async(tensors: &[&Tensor], name: &str, options: impl Into<Allreduce>) -> GroupHandle;
    allgather(tensor: &Tensor, name: &str) -> Tensor;
    allgather_async(tensor: &Tensor, name: &str) -> TensorHandle;
    grouped_allgather(tensors: &[&Tensor], name: &str) -> Vec<Tensor>;
    grouped_allgather_async(tensors: &[&Tensor], name: &str) -> GroupHandle;
    alltoall(tensor: &Tensor, name: &str, splits: Option<&[i64]>) -> (Tensor, Vec<i64>);
    alltoall_async(tensor: &Tensor, name: &str, splits: Option<&[i64]>) -> TensorHandle;
    broadcast(tensor: &Tensor, name: &str, root: usize) -> Tensor;
    broadcast_(tensor: &Tensor, name: &str, root: usize) -> ();
    broadcast_async(tensor: &Tensor, name: &str, root: usize) -> TensorHandle;
    broadcast_async_(tensor: &Tensor, name: &str, root: usize) -> TensorHandle;
    broadcast_parameters(params: &[(String, Tensor)], root: usize) -> ();
    broadcast_optimizer_state(optimizer: &mut impl Optimizer, root: usize) -> ();
    send(tensor: &Tensor, peer: usize, tag: u32) -> ();
    send_async(tensor: &Tensor, peer: usize, tag: u32) -> MessageHandle;
    recv_(tensor: &Tensor, peer: usize, tag: u32) -> ();
    recv_async_(tensor: &Tensor, peer: usize, tag: u32) -> MessageHandle;
    metric_average(value: f64, name: &str) -> f64;
}

/// Returns on no rank before all ranks of the global world have called it.
pub fn barrier() -> Result<()> {
    Ok(world()?.barrier()?)
}

/// Says that this rank has no more data, and waits for all others to say so; the last rank that did. See
/// [`hvd_core::ProcessSet::join`].
pub fn join() -> Result<usize> {
    Ok(world()?.join()?)
}

/// Starts to write what happens to this rank's tensors to a file that Perfetto opens; see
/// [`hvd_core::World::start_timeline`].
pub fn start_timeline(path: impl AsRef<Path>, mark_rounds: bool) -> Result<()> {
    Ok(world()?.start_timeline(path, mark_rounds)?)
}

/// Ends the timeline; see [`hvd_core::World::stop_timeline`].
pub fn stop_timeline() -> Result<()> {
    world()?.stop_timeline();
    Ok(())
}
