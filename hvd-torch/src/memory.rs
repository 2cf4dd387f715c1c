//! The elements of a tensor as memory of the runtime, and back.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use hvd_core::{DType, Memory, World};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Keeps a tensor's storage alive while an operation uses its elements.
struct Keep(#[allow(dead_code)] Tensor);

// SAFETY: nobody touches the tensor inside until it is dropped, which any one thread may do.
unsafe impl Sync for Keep {}

/// The runtime's name for `kind`.
pub(crate) fn dtype(kind: Kind) -> Result<DType> {
    Ok(match kind {
        Kind::Half => DType::F16,
        Kind::BFloat16 => DType::BF16,
        Kind::Float => DType::F32,
        Kind::Double => DType::F64,
        Kind::Int => DType::I32,
        Kind::Int64 => DType::I64,
        Kind::Uint8 => DType::U8,
        Kind::Int8 => DType::I8,
        Kind::Int16 => DType::I16,
        Kind::Bool => DType::Bool,
        other => return Err(Error::invalid(format!("ranks cannot exchange tensors of kind {other:?}"))),
    })
}

/// The dimensions of a tensor.
pub(crate) fn shape(tensor: &Tensor) -> Vec<usize> {
    tensor.size().into_iter().map(|dim| dim.unsigned_abs() as usize).collect()
}

/// Whether the runtime can read and write the tensor's elements where they are.
pub(crate) fn is_direct(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.is_contiguous()
}

/// The elements of a tensor for which [`is_direct`] holds. The memory shares the tensor's storage and keeps it alive.
pub(crate) fn of(tensor: &Tensor) -> Result<Memory> {
    debug_assert!(is_direct(tensor));
    let len = tensor.numel() * dtype(tensor.kind())?.size();
    let Some(start) = NonNull::new(tensor.data_ptr().cast::<u8>()) else { return Ok(Memory::empty()) };
    let owner = Arc::new(Keep(tensor.shallow_clone()));
    // SAFETY: a contiguous CPU tensor has its elements in one span from its data pointer; the owner holds the storage.
    Ok(unsafe { Memory::from_raw_parts(start, len, Some(owner)) })
}

/// A flat tensor of zeros, in memory that the ranks of `world` reduce in place where there is such. All of them must call it.
pub(crate) fn shared_zeros(world: Option<&World>, elements: usize, kind: Kind, device: Device) -> Result<Tensor> {
    let bytes = elements.saturating_mul(dtype(kind)?.size());
    let shared = match (device, world) {
        (Device::Cpu, Some(world)) => world.shared_memory(bytes)?,
        _ => None,
    };
    Ok(match shared {
        Some(memory) => crate::shim::over_memory(memory)?.f_view_dtype(kind)?,
        None => Tensor::f_zeros([elements as i64], (kind, device))?,
    })
}

/// Makes tensors of a size that only the operation knows.
#[derive(Clone, Debug)]
pub(crate) struct Allocator {
    made: Arc<Mutex<Option<Tensor>>>,
    kind: Kind,
}

impl Allocator {
    pub(crate) fn new(kind: Kind) -> Self {
        Allocator { made: Arc::default(), kind }
    }

    /// A one-dimensional tensor of `bytes` bytes; memory of no bytes if torch cannot make it.
    pub(crate) fn allocate(&self, bytes: usize) -> Memory {
        let Ok(dtype) = dtype(self.kind) else { return Memory::empty() };
        let count = (bytes / dtype.size()) as i64;
        let Ok(tensor) = Tensor::f_empty([count], (self.kind, Device::Cpu)) else { return Memory::empty() };
        let memory = of(&tensor).unwrap_or_else(|_| Memory::empty());
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = Some(tensor);
        memory
    }

    /// The tensor that was made.
    pub(crate) fn take(&self) -> Option<Tensor> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
