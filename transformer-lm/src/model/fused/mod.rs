//! Functions that are quicker on the CPU than torch's, with the same results to rounding and gradients of their own.
//!
//! They serve f32; for other types, on other devices and where they do not apply they are torch's. A result has the same bits on
//! every run with the same number of threads.

mod activation;
mod attention;
mod head;
mod span;

pub use activation::gelu;
pub use attention::causal_attention;
pub use head::{HeadLoss, HeadOptions, linear_cross_entropy};

pub(super) use span::Span;

use tch::{Device, Kind, Tensor};

/// Whether the functions here can read and write the tensor's elements.
pub(super) fn is_served(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous() && tensor.numel() > 0
}
