//! Distributed training for `tch`: [`DistributedOptimizer`], [`broadcast_parameters`], tensor collectives, and what tch
//! lacks for it: hooks, autocast, a fused [`AdamW`] whose state can be saved.
//!
//! ```no_run
//! use hvd_torch::{AdamW, DistributedOptimizer, Optimizer, ParamGroup};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> hvd_torch::Result<()> {
//! hvd_torch::init()?;
//! let weight = Tensor::zeros([4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
//! let params = vec![("weight".to_string(), weight.shallow_clone())];
//! hvd_torch::broadcast_parameters(&params, 0)?;
//! let adamw = AdamW::new(vec![ParamGroup { params, lr: 1e-3, weight_decay: 0.1 }], (0.9, 0.95), 1e-8)?;
//! let mut optimizer = DistributedOptimizer::builder(adamw).build()?;
//! for _ in 0..10 {
//!     optimizer.zero_grad()?;
//!     (&weight - 1.0).square().sum(Kind::Float).backward();
//!     optimizer.step()?;
//! }
//! hvd_torch::shutdown()?;
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]

mod shim;

mod error;
mod memory;

pub mod autograd;
pub mod foreach;

mod autocast;
mod broadcast;
mod cuda;
mod distributed;
mod global;
pub mod nn;
pub mod ops;
pub mod optim;
mod random;
mod sampler;
mod threads;

pub use autocast::Autocast;
pub use autograd::{Hook, set_grad};
pub use cuda::{CudaStatus, load_cuda};
pub use distributed::{Builder, DistributedOptimizer};
pub use error::{Error, Result};
pub use global::{
    allgather, allgather_async, allreduce, allreduce_, allreduce_async, allreduce_async_, alltoall, alltoall_async,
    barrier, broadcast, broadcast_, broadcast_async, broadcast_async_, broadcast_optimizer_state, broadcast_parameters,
    grouped_allgather, grouped_allgather_async, grouped_allreduce, grouped_allreduce_, grouped_allreduce_async,
    grouped_allreduce_async_, grouped_reducescatter, grouped_reducescatter_async, join, metric_average, recv_,
    recv_async_, reducescatter, reducescatter_async, send, send_async, sparse_allreduce, sparse_allreduce_async,
    start_timeline, stop_timeline,
};
pub use nn::SyncBatchNorm;
pub use optim::{AdamW, Optimizer, ParamGroup, ShardedAdamW, TchOptimizer, named_parameters, named_variables};
pub use random::{Determinism, manual_seed, mix, reseed, set_deterministic};
pub use sampler::DistributedSampler;
pub use threads::{Tasks, num_threads, parallel_for, set_num_threads, share_tasks};

pub use hvd_core::{
    Allreduce, Backend, Capability, Compression, Observer, Phase, ProcessSet, ReduceOp, Topology, World, capabilities,
    ccl_built, cross_rank, cross_size, cuda_built, ddl_built, gloo_built, gloo_enabled, init, init_with,
    init_with_process_sets, is_initialised, local_rank, local_size, mpi_built, mpi_enabled, mpi_threads_supported,
    nccl_built, rank, rocm_built, shm_built, shm_enabled, shutdown, size, tcp_built, tcp_enabled, world,
};

/// Whether this process should write logs and files: rank 0, or a process without a world.
pub fn is_main_process() -> bool {
    rank().map_or(true, |rank| rank == 0)
}
