//! Distributed training runtime: ranks, collectives, and a background engine that negotiates, fuses, compresses and
//! reduces named buffers.
//!
//! Most programs need only [`World`]. The modules below it are public so that they can be tested, measured and reused;
//! they are listed bottom to top, and imports only go down.
#![deny(missing_docs)]

pub mod config;
pub mod device;
pub mod error;
pub mod logging;
pub mod memory;
pub mod topology;

pub use hvd_kernels::{dtype, reduce, wire};

pub mod transport;

pub mod collective;
pub mod shm;

pub mod engine;

pub mod world;

pub mod capability;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;

pub use capability::{
    Capability, capabilities, ccl_built, cuda_built, ddl_built, gloo_built, gloo_enabled, mpi_built, nccl_built,
    rocm_built, shm_built, tcp_built,
};
pub use device::Device;
pub use dtype::{DType, Element};
pub use engine::observe::{Observer, Phase};
pub use engine::submission::{Allreduce, Completion, OpKind, Output, Submission};
pub use engine::{GroupHandle, Handle};
pub use error::{Error, Result};
pub use memory::Memory;
pub use reduce::ReduceOp;
pub use topology::Topology;
pub use wire::Compression;
pub use world::{
    Backend, GroupVecHandle, JoinHandle, ProcessSet, SharedBuffer, SharedHandle, SparseHandle, VecHandle, World,
    cross_rank, cross_size, init, init_with, init_with_process_sets, is_initialised, local_rank, local_size,
    mpi_enabled, mpi_threads_supported, rank, shm_enabled, shutdown, size, tcp_enabled, world,
};
