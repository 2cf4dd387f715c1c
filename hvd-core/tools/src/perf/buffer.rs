//! Buffers of either kind.

use std::ops::{Deref, DerefMut};

use anyhow::{Context, Result};
use hvd_core::{Allreduce, SharedBuffer, SharedHandle, VecHandle, World};

use super::args::BufferKind;
use super::check::Value;

/// Memory that is reduced.
pub enum Buffer<T> {
    /// This rank's own.
    Private(Vec<T>),
    /// The runtime's.
    Shared(SharedBuffer<T>),
}

/// An allreduce under way.
pub enum Pending<T> {
    /// Of this rank's own memory.
    Private(VecHandle<T>),
    /// Of the runtime's.
    Shared(SharedHandle<T>),
}

impl<T: Value> Buffer<T> {
    /// `count` zeros. Of shared ones all ranks must ask for the same.
    pub fn new(world: &World, kind: BufferKind, count: usize) -> Result<Self> {
        match kind {
            BufferKind::Private => private(count).map(Buffer::Private),
            BufferKind::Shared => Ok(Buffer::Shared(world.shared_buffer(count)?)),
        }
    }

    /// Starts an allreduce.
    pub fn allreduce_async(self, world: &World, name: &str, options: Allreduce) -> hvd_core::Result<Pending<T>> {
        match self {
            Buffer::Private(data) => world.allreduce_async(name, data, options).map(Pending::Private),
            Buffer::Shared(buffer) => world.allreduce_shared_async(name, buffer, options).map(Pending::Shared),
        }
    }
}

impl<T: Value> Pending<T> {
    /// Gives the buffer back with the result.
    pub fn wait(self) -> hvd_core::Result<Buffer<T>> {
        match self {
            Pending::Private(handle) => handle.wait().map(Buffer::Private),
            Pending::Shared(handle) => handle.wait().map(Buffer::Shared),
        }
    }
}

/// `count` zeros in this rank's own memory.
pub fn private<T: Value>(count: usize) -> Result<Vec<T>> {
    let mut data = Vec::new();
    let bytes = count * size_of::<T>();
    data.try_reserve_exact(count)
        .with_context(|| format!("no memory for a buffer of {bytes} bytes; lower --max-bytes"))?;
    data.resize(count, T::default());
    Ok(data)
}

impl<T: Value> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Buffer::Private(data) => data,
            Buffer::Shared(buffer) => buffer,
        }
    }
}

impl<T: Value> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Buffer::Private(data) => data,
            Buffer::Shared(buffer) => buffer,
        }
    }
}
