//! Operations that move elements and combine none: broadcast, allgather, alltoall, messages from rank to rank.

use hvd_core::{OpKind, ProcessSet, VecHandle, World};
use tch::Tensor;

use super::gradient;
use super::handle::{GroupHandle, TensorHandle, copy_of, in_place, of_rows, stage, submit, submit_group};
use super::reduce::member;
use crate::error::{Error, Result};
use crate::memory;

/// Starts a broadcast that overwrites `tensor` with that of rank `root`. Leave the tensor alone until it is done.
pub fn broadcast_async_(set: &ProcessSet, tensor: &Tensor, name: &str, root: usize) -> Result<TensorHandle> {
    submit(set, in_place(tensor, name, OpKind::Broadcast { root })?)
}

/// Overwrites `tensor` with that of rank `root`, a rank of the world.
pub fn broadcast_(set: &ProcessSet, tensor: &Tensor, name: &str, root: usize) -> Result<()> {
    broadcast_async_(set, tensor, name, root)?.wait().map(drop)
}

/// Starts a broadcast of the tensor of rank `root` into a new tensor.
pub fn broadcast_async(set: &ProcessSet, tensor: &Tensor, name: &str, root: usize) -> Result<TensorHandle> {
    broadcast_async_(set, &copy_of(tensor)?, name, root)
}

/// The tensor of rank `root`, as a new tensor. Kind and shape must be the same on all ranks. The gradient goes to the root.
pub fn broadcast(set: &ProcessSet, tensor: &Tensor, name: &str, root: usize) -> Result<Tensor> {
    let result = broadcast_async(set, tensor, name, root)?.wait()?;
    if gradient::wanted([tensor]) {
        gradient::of_broadcast(set, name, root, tensor, &result)?;
    }
    Ok(result)
}

/// Starts to gather the ranks' tensors.
pub fn allgather_async(set: &ProcessSet, tensor: &Tensor, name: &str) -> Result<TensorHandle> {
    submit(set, of_rows(tensor, name, OpKind::Allgather)?)
}

/// The ranks' tensors one after the other along the first dimension, in which they may differ. A gradient goes through.
pub fn allgather(set: &ProcessSet, tensor: &Tensor, name: &str) -> Result<Tensor> {
    let (result, rows) = allgather_async(set, tensor, name)?.wait_with_rows()?;
    if gradient::wanted([tensor]) {
        gradient::of_allgather(set, name, &[&rows], &[tensor], std::slice::from_ref(&result))?;
    }
    Ok(result)
}

/// Starts to gather several of the ranks' tensors, negotiated as one.
pub fn grouped_allgather_async(set: &ProcessSet, tensors: &[&Tensor], name: &str) -> Result<GroupHandle> {
    let member = |(at, tensor): (usize, &&Tensor)| of_rows(tensor, &member(name, at), OpKind::Allgather);
    submit_group(set, name, tensors.iter().enumerate().map(member))
}

/// As [`allgather`] for several tensors, negotiated as one.
pub fn grouped_allgather(set: &ProcessSet, tensors: &[&Tensor], name: &str) -> Result<Vec<Tensor>> {
    let (results, rows): (Vec<_>, Vec<_>) =
        grouped_allgather_async(set, tensors, name)?.wait_with_rows()?.into_iter().unzip();
    if gradient::wanted(tensors.iter().copied()) {
        let rows: Vec<_> = rows.iter().map(Vec::as_slice).collect();
        gradient::of_allgather(set, name, &rows, tensors, &results)?;
    }
    Ok(results)
}

/// Starts to send each rank its rows; [`TensorHandle::wait_with_rows`] also gives how many came from each.
pub fn alltoall_async(set: &ProcessSet, tensor: &Tensor, name: &str, splits: Option<&[i64]>) -> Result<TensorHandle> {
    let whole = |&rows: &i64| {
        usize::try_from(rows)
            .map_err(|_| Error::invalid(format!("`{name}`: {rows} rows in `splits`; expected 0 or more")))
    };
    let splits = splits.map(|splits| splits.iter().map(whole).collect::<Result<Vec<_>>>()).transpose()?;
    submit(set, of_rows(tensor, name, OpKind::Alltoall { splits })?)
}

/// Sends each rank its rows: what came from all, by rank, and how many rows from each. `splits` says how many rows go to
/// each rank, one after the other, and must sum to all rows; without, equally many go to each. A gradient goes through.
pub fn alltoall(set: &ProcessSet, tensor: &Tensor, name: &str, splits: Option<&[i64]>) -> Result<(Tensor, Vec<i64>)> {
    let (result, received) = alltoall_async(set, tensor, name, splits)?.wait_with_rows()?;
    if gradient::wanted([tensor]) {
        gradient::of_alltoall(set, name, &received, tensor, &result)?;
    }
    Ok((result, received))
}

/// A message from one rank to another that is under way. Dropping it does not cancel it.
#[must_use = "what is received is there, and a failure known, only after `wait`"]
pub struct MessageHandle {
    handle: VecHandle<u8>,
    /// What is overwritten with a message that is received.
    receiver: Option<Tensor>,
}

impl MessageHandle {
    /// Whether [`MessageHandle::wait`] would return at once.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits until the message has been sent, or is in the tensor.
    ///
    /// # Errors
    /// As [`hvd_core::World::recv_into`].
    pub fn wait(self) -> Result<()> {
        let message = self.handle.wait()?;
        let Some(tensor) = self.receiver else { return Ok(()) };
        let received = Tensor::f_from_data_size(&message, &tensor.size(), tensor.kind())?;
        tch::no_grad(|| tensor.shallow_clone().f_copy_(&received))?;
        Ok(())
    }
}

impl std::fmt::Debug for MessageHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MessageHandle(into {:?})", self.receiver)
    }
}

/// Starts to send the elements of `tensor`, which may be changed meanwhile, to rank `peer`, which receives them under the same `tag`; see
/// [`hvd_core::World::send_async`].
pub fn send_async(world: &World, tensor: &Tensor, peer: usize, tag: u32) -> Result<MessageHandle> {
    let elements = memory::of(&stage(tensor)?)?;
    // SAFETY: the elements are those of a copy of ours.
    let message = unsafe { elements.as_slice() }.to_vec();
    Ok(MessageHandle { handle: world.send_async(peer, tag, message)?, receiver: None })
}

/// As [`send_async`]; returns once the peer has begun to receive.
pub fn send(world: &World, tensor: &Tensor, peer: usize, tag: u32) -> Result<()> {
    send_async(world, tensor, peer, tag)?.wait()
}

/// Starts to receive what rank `peer` sends under `tag`: as many bytes as `tensor` has, and of the same kind, which is not checked.
/// [`MessageHandle::wait`] overwrites the tensor.
pub fn recv_async_(world: &World, tensor: &Tensor, peer: usize, tag: u32) -> Result<MessageHandle> {
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    Ok(MessageHandle { handle: world.recv_exactly_async(peer, tag, bytes)?, receiver: Some(tensor.shallow_clone()) })
}

/// Overwrites `tensor` with what rank `peer` sends under `tag`: as many bytes, and of the same kind, which is not checked.
///
/// # Errors
/// If the number of bytes differs; see [`hvd_core::World::recv_into`].
pub fn recv_(world: &World, tensor: &Tensor, peer: usize, tag: u32) -> Result<()> {
    recv_async_(world, tensor, peer, tag)?.wait()
}
