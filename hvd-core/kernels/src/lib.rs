//! Element types, and the loops over them: [`reduce`] combines elements, [`wire`] converts and scales them; [`simd`] compiles such
//! loops for several instruction sets.
//!
//! A package of its own so that a debug build can optimise these loops without optimising the runtime around them. Users
//! see it through `hvd_core`, which re-exports its modules.
#![deny(missing_docs)]

pub mod dtype;
pub mod reduce;
pub mod simd;
pub mod wire;

pub use dtype::{DType, Element};
pub use reduce::ReduceOp;
pub use wire::Compression;
