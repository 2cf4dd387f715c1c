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
pub mod ops;
pub mod optim;
mod random;
mod sampler;

pub use autocast::Autocast;
pub use autograd::{Hook, set_grad};
pub use cuda::{CudaStatus, load_cuda};
pub use distributed::{Builder, DistributedOptimizer};
pub use error::{Error, Result};
pub use optim::{AdamW, Optimizer, ParamGroup, ShardedAdamW, TchOptimizer, named_parameters, named_variables};
pub use random::{Determinism, manual_seed, mix, reseed, set_deterministic, set_num_threads};
pub use sampler::DistributedSampler;

pub use hvd_core::{
    Allreduce, Backend, Compression, Observer, Phase, ReduceOp, Topology, World, cross_rank, cross_size, init,
    init_with, is_initialised, local_rank, local_size, rank, shutdown, size, world,
};

use tch::Tensor;

/// Whether this process should write logs and files: rank 0, or a process without a world.
pub fn is_main_process() -> bool {
    rank().map_or(true, |rank| rank == 0)
}

/// Overwrites the tensors of all ranks with those of rank `root`; see [`ops::broadcast_parameters`].
pub fn broadcast_parameters(params: &[(String, Tensor)], root: usize) -> Result<()> {
    ops::broadcast_parameters(&world()?, params, root)
}

/// Overwrites the optimizer's state on all ranks with that of rank `root`; see [`ops::broadcast_optimizer_state`].
pub fn broadcast_optimizer_state<O: Optimizer>(optimizer: &mut O, root: usize) -> Result<()> {
    ops::broadcast_optimizer_state(&world()?, optimizer, root)
}

/// The reduction of the ranks' tensors, as a new tensor; see [`ops::allreduce`].
pub fn allreduce(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Result<Tensor> {
    ops::allreduce(&world()?, tensor, name, options)
}

/// Reduces `tensor` over all ranks, in place; see [`ops::allreduce_`].
pub fn allreduce_(tensor: &Tensor, name: &str, options: impl Into<Allreduce>) -> Result<()> {
    ops::allreduce_(&world()?, tensor, name, options)
}

/// The ranks' tensors one after the other; see [`ops::allgather`].
pub fn allgather(tensor: &Tensor, name: &str) -> Result<Tensor> {
    ops::allgather(&world()?, tensor, name)
}

/// The tensor of rank `root`, as a new tensor; see [`ops::broadcast`].
pub fn broadcast(tensor: &Tensor, name: &str, root: usize) -> Result<Tensor> {
    ops::broadcast(&world()?, tensor, name, root)
}

/// Overwrites `tensor` with that of rank `root`; see [`ops::broadcast_`].
pub fn broadcast_(tensor: &Tensor, name: &str, root: usize) -> Result<()> {
    ops::broadcast_(&world()?, tensor, name, root)
}

/// The average of a number over all ranks; see [`ops::metric_average`].
pub fn metric_average(value: f64, name: &str) -> Result<f64> {
    ops::metric_average(&world()?, value, name)
}
