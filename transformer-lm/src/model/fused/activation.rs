//! GELU.

use hvd_torch::autograd::differentiate;
use hvd_torch::parallel_for;
use tch::Tensor;

use super::is_served;
use super::span::Span;
use crate::Result;

/// Elements that are worth a thread.
const GRAIN: usize = 1 << 13;

/// GELU in its tanh form, of every element.
///
/// # Errors
/// If torch fails.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !is_served(x) {
        return Ok(x.f_gelu("tanh")?);
    }
    let x_values = x.detach();
    let out = x_values.f_empty_like()?;
    let (from, to) = (Span::of(&x_values), Span::of(&out));
    parallel_for(x.numel(), GRAIN, &|range| {
        // SAFETY: `x` is read by all, and each range of `out` is written by one thread; so below.
        unsafe { lm_kernels::gelu(from.read(range.clone()), to.write(range)) };
    })?;
    let out = [out];
    differentiate(&[x], &out, move |grads| Ok(vec![backward(&x_values, &grads[0])?]))?;
    let [out] = out;
    Ok(out)
}

fn backward(x: &Tensor, grad: &Tensor) -> hvd_torch::Result<Tensor> {
    let grad = grad.f_contiguous()?;
    let out = x.f_empty_like()?;
    let (x, given, to) = (Span::of(x), Span::of(&grad), Span::of(&out));
    parallel_for(out.numel(), GRAIN, &|range| {
        // SAFETY: as above.
        unsafe { lm_kernels::gelu_backward(x.read(range.clone()), given.read(range.clone()), to.write(range)) };
    })?;
    Ok(out)
}
