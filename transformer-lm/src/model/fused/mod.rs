//! Functions that are quicker on the CPU than torch's, with the same results to rounding and gradients of their own.
//!
//! They serve f32; for other types, on other devices and where they do not apply they are torch's. A result has the same bits on
//! every run with the same number of threads.

mod activation;
mod attention;
mod head;
mod linear;
mod norm;
mod span;

pub use activation::gelu;
pub use attention::causal_attention;
pub use head::{HeadLoss, HeadOptions, linear_cross_entropy};
pub use linear::{Dense, add_linear, embedding, linear};
pub use norm::{LayerNormOptions, add_linear_norm, layer_norm};

pub(super) use attention::{Attend, attention};
pub(super) use span::Span;

use hvd_torch::Autocast;
use tch::{Device, Kind, Tensor};

/// Whether functions of `x`, on this thread, are those here: where they are torch's, they are best left whole.
pub(super) fn is_quick(x: &Tensor) -> bool {
    is_served(x) && !Autocast::is_on(Device::Cpu)
}

/// Whether the functions here can read and write the tensor's elements.
pub(super) fn is_served(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous() && tensor.numel() > 0
}

/// Whether `vector` has an element for each of the last dimension of `tensor`.
fn is_vector(vector: &Tensor, tensor: &Tensor) -> bool {
    vector.dim() == 1 && tensor.size().last() == Some(&vector.size()[0])
}
