//! Functions that are quicker on the CPU than torch's, with the same results to rounding and gradients of their own.
//!
//! They serve f32, and under autocast to bf16, on a processor that has products of it, bf16: weights, the residual stream and sums stay
//! in f32, what goes into products is bf16 (attention of bf16 needs no autocast). For other types, on other devices and where they do not apply they are torch's. A result
//! has the same bits on every run with the same number of threads.

mod activation;
mod attention;
mod feed_forward;
mod head;
mod linear;
mod narrow;
mod norm;
mod span;

pub use activation::{gelu, linear_gelu};
pub use attention::causal_attention;
pub use feed_forward::{add_mlp, add_mlp_norm};
pub use head::{HeadLoss, HeadOptions, linear_cross_entropy};
pub use linear::{Dense, add_linear, embedding, linear};
pub use norm::{LayerNormOptions, add_linear_norm, layer_norm};

pub(super) use attention::{Attend, attention};
pub(super) use span::Span;

use hvd_torch::Autocast;
use lm_kernels::Unit;
use tch::{Device, Kind, Tensor};

use span::Held;

/// What goes into products on this thread where the functions here compute them; none where torch does.
fn kind_of_products() -> Option<Kind> {
    match Autocast::kind(Device::Cpu) {
        None => Some(Kind::Float),
        Some(Kind::BFloat16) if has_bf16() => Some(Kind::BFloat16),
        Some(_) => None,
    }
}

/// Whether the processor has products of bf16.
fn has_bf16() -> bool {
    Unit::best().is_some()
}

/// Whether a product of `x` (.., in) and `weight` (out, in), on this thread, is one of those here: where it is torch's, what is around it
/// is best left whole.
fn is_quick(x: &Tensor, weight: &Tensor) -> bool {
    match kind_of_products() {
        Some(Kind::BFloat16) => holds::<half::bf16>(x) && is_served(weight) && weight.dim() == 2,
        Some(_) => is_served(x) && is_served(weight),
        None => false,
    }
}

/// Whether the functions here can read and write the tensor's elements, in f32.
pub(super) fn is_served(tensor: &Tensor) -> bool {
    holds::<f32>(tensor)
}

/// Whether the tensor has elements of this type, one after the other in the processor's memory.
fn holds<T: Held>(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == T::KIND && tensor.is_contiguous() && tensor.numel() > 0
}

/// Whether `vector` has an element for each of the last dimension of `tensor`.
fn is_vector(vector: &Tensor, tensor: &Tensor) -> bool {
    vector.dim() == 1 && tensor.size().last() == Some(&vector.size()[0])
}
