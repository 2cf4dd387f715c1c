//! GELU.

use half::bf16;
use hvd_torch::autograd::{differentiate, wanted};
use hvd_torch::parallel_for;
use lm_kernels::Element;
use tch::{Kind, Tensor};

use super::linear::{Dense, Weight, linear, linear_backward};
use super::span::{Held, Span, sum_over_rows};
use super::{is_served, is_vector, narrow};
use crate::{Error, Result};

/// Elements that are worth a thread.
const GRAIN: usize = 1 << 13;

/// GELU in its tanh form, of every element of `x + bias`, where the bias has an element for each of the last dimension. The result may
/// take the place of the elements of `x`: nobody else may need them.
///
/// # Errors
/// A bias of another length; if torch fails.
pub fn gelu(x: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Some(bias) = bias.filter(|bias| is_served(&x) && is_served(bias)) else {
        let x = bias.map_or(Ok(x.shallow_clone()), |bias| x.f_add(bias))?;
        return Ok(x.f_gelu("tanh")?);
    };
    if !is_vector(bias, &x) {
        return Err(Error::Config(format!("GELU of {x:?} with a bias of {bias:?}")));
    }
    let columns = bias.numel();
    let inputs = [&x, bias];
    let out = [x.detach()];
    let slopes = wanted(inputs).then(|| out[0].f_empty_like()).transpose()?;
    let (values, bias_values) = (Span::of(&out[0]), Span::of(&bias.detach()));
    let kept = slopes.as_ref().map(Span::of);
    parallel_for(x.numel() / columns, GRAIN.div_ceil(columns), &|rows| {
        let range = rows.start * columns..rows.end * columns;
        // SAFETY: each range of the values and the slopes belongs to one thread; the bias is only read.
        unsafe {
            let slopes = kept.as_ref().map(|kept| kept.write(range.clone()));
            lm_kernels::bias_gelu(values.write(range), bias_values.all(), slopes);
        }
    })?;
    if let Some(slopes) = slopes {
        differentiate(&inputs, &out, move |grads| Ok(Vec::from(backward::<f32>(&slopes, &grads[0], columns)?)))?;
    }
    let [out] = out;
    Ok(out)
}

/// [`gelu`] of a layer's result.
///
/// # Errors
/// If torch fails, for instance as shapes do not fit.
pub fn linear_gelu(x: &Tensor, layer: Dense) -> Result<Tensor> {
    if !layer.is_served(x) {
        return gelu(linear(x, layer.weight, Some(layer.bias))?, None);
    }
    if x.kind() != Kind::BFloat16 {
        return gelu(linear(x, layer.weight, None)?, Some(layer.bias));
    }
    let (kept, input) = (Weight::of(layer.weight), x.detach());
    let inputs = [x, layer.weight, layer.bias];
    let (out, slopes) = narrow::linear_gelu(&input, &kept.values, &layer.bias.detach(), wanted(inputs))?;
    let out = [out];
    if let Some(slopes) = slopes {
        let columns = layer.bias.numel();
        differentiate(&inputs, &out, move |grads| {
            let [grad, of_bias] = backward::<bf16>(&slopes, &grads[0], columns)?;
            let [of_x, of_weight] = linear_backward(&grad, &input, &kept)?;
            Ok(vec![of_x, of_weight, of_bias])
        })?;
    }
    let [out] = out;
    Ok(out)
}

/// The gradients of `x` and of the bias.
fn backward<E: Element + Held>(slopes: &Tensor, grad: &Tensor, columns: usize) -> hvd_torch::Result<[Tensor; 2]> {
    let grad = grad.f_contiguous()?;
    let out = slopes.f_empty_like()?;
    let (slopes, given, to) = (Span::<E>::of(slopes), Span::<E>::of(&grad), Span::<E>::of(&out));
    let sums = sum_over_rows(out.numel() / columns, columns, &|rows, sums| {
        let range = rows.start * columns..rows.end * columns;
        // SAFETY: each range of `out` is written by one thread, the others are only read.
        unsafe {
            lm_kernels::gelu_backward(slopes.read(range.clone()), given.read(range.clone()), to.write(range), sums);
        }
    })?;
    Ok([out, sums])
}
