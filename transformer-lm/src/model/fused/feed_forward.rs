//! The feed-forward part of a block: two layers, with GELU between them.
//!
//! In bf16 it is one function: the product that gives the gradient of the activation multiplies it by the slopes at once.

use hvd_torch::autograd::{differentiate, wanted};
use tch::{Kind, Tensor};

use super::linear::{Dense, Weight, add_linear, add_product, sum_rows};
use super::norm::{LayerNormOptions, add_linear_norm, normalise};
use super::{is_served, linear_gelu, narrow};
use crate::Result;

/// `residual + down(gelu(up(x)))`.
///
/// # Errors
/// If torch fails, for instance as shapes do not fit.
pub fn add_mlp(residual: &Tensor, x: &Tensor, [up, down]: [Dense; 2]) -> Result<Tensor> {
    if !is_narrow(residual, x, [up, down]) {
        return add_linear(residual, &linear_gelu(x, up)?, down);
    }
    let inputs = [residual, x, up.weight, up.bias, down.weight, down.bias];
    let part = FeedForward::new(x, [up, down], wanted(inputs))?;
    let sum = [part.add_to(residual, down.bias)?];
    differentiate(&inputs, &sum, move |grads| {
        let grad = grads[0].f_contiguous()?;
        let of_bias = sum_rows(&grad)?;
        let [of_x, of_up, of_up_bias, of_down] = part.backward(&grad)?;
        Ok(vec![grad, of_x, of_up, of_up_bias, of_down, of_bias])
    })?;
    let [sum] = sum;
    Ok(sum)
}

/// [`add_mlp`], and [`layer_norm`](super::layer_norm) of it.
///
/// # Errors
/// Shapes that do not fit; if torch fails.
pub fn add_mlp_norm(
    residual: &Tensor,
    x: &Tensor,
    [up, down]: [Dense; 2],
    norm: LayerNormOptions,
) -> Result<(Tensor, Tensor)> {
    if !is_narrow(residual, x, [up, down]) || !norm.is_served(residual) {
        return add_linear_norm(residual, &linear_gelu(x, up)?, down, norm);
    }
    let inputs = [residual, x, up.weight, up.bias, down.weight, down.bias, norm.weight, norm.bias];
    let part = FeedForward::new(x, [up, down], wanted(inputs))?;
    let sum = part.add_to(residual, down.bias)?;
    let (out, saved) = normalise(sum.detach(), norm, wanted(inputs))?;
    let results = [sum, out];
    if let Some(saved) = saved {
        differentiate(&inputs, &results, move |grads| {
            let (grad, narrow, [of_scale, of_shift, of_bias]) = saved.backward(&grads[1], Some(&grads[0]))?;
            let [of_x, of_up, of_up_bias, of_down] = part.backward(narrow.as_ref().unwrap_or(&grad))?;
            Ok(vec![grad, of_x, of_up, of_up_bias, of_down, of_bias, of_scale, of_shift])
        })?;
    }
    let [sum, out] = results;
    Ok((sum, out))
}

/// Whether it is one function.
fn is_narrow(residual: &Tensor, x: &Tensor, [up, down]: [Dense; 2]) -> bool {
    x.kind() == Kind::BFloat16 && up.is_served(x) && [residual, down.weight, down.bias].into_iter().all(is_served)
}

/// What a backward pass needs.
struct FeedForward {
    up: Weight,
    down: Weight,
    x: Tensor,
    /// What the activation gave.
    hidden: Tensor,
    /// Its slopes, where there will be a backward pass.
    slopes: Option<Tensor>,
}

impl FeedForward {
    fn new(x: &Tensor, [up, down]: [Dense; 2], wanted: bool) -> Result<FeedForward> {
        let (bias, x) = (up.bias.detach(), x.detach());
        let (up, down) = (Weight::of(up.weight), Weight::of(down.weight));
        let (hidden, slopes) = narrow::linear_gelu(&x, &up.values, &bias, wanted)?;
        Ok(FeedForward { up, down, x, hidden, slopes })
    }

    fn add_to(&self, residual: &Tensor, bias: &Tensor) -> Result<Tensor> {
        add_product(residual, &self.hidden, &self.down, bias)
    }

    /// The gradients of the input, the first layer's weight and bias, and the second one's weight.
    fn backward(&self, grad: &Tensor) -> hvd_torch::Result<[Tensor; 4]> {
        let [of_sum, of_down] = narrow::linear_backward(grad, &self.hidden, &self.down, self.slopes.as_ref())?;
        let [of_x, of_up] = narrow::linear_backward(&of_sum, &self.x, &self.up, None)?;
        Ok([of_x, of_up, sum_rows(&of_sum)?, of_down])
    }
}
