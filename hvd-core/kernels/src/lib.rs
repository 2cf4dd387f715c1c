//! Element types, and the loops over them: [`reduce`] combines elements, [`wire`] converts and scales them, [`neural`] does what of a
//! network is no matrix product, [`product`] multiplies matrices with few vectors.
//!
//! A package of its own so that a debug build can optimise these loops without optimising the runtime around them. Users
//! see it through `hvd_core`, which re-exports its modules.
#![deny(missing_docs)]

pub mod dtype;
pub mod neural;
pub mod product;
pub mod reduce;
pub mod wire;

pub use dtype::{DType, Element};
pub use reduce::ReduceOp;
pub use wire::Compression;
