//! GELU.

use hvd_torch::autograd::{differentiate, wanted};
use hvd_torch::parallel_for;
use tch::Tensor;

use super::span::{Span, sum_over_rows};
use super::{is_served, is_vector};
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
        differentiate(&inputs, &out, move |grads| backward(&slopes, &grads[0], columns))?;
    }
    let [out] = out;
    Ok(out)
}

/// The gradients of `x` and of the bias.
fn backward(slopes: &Tensor, grad: &Tensor, columns: usize) -> hvd_torch::Result<Vec<Tensor>> {
    let grad = grad.f_contiguous()?;
    let out = slopes.f_empty_like()?;
    let (slopes, given, to) = (Span::of(slopes), Span::of(&grad), Span::of(&out));
    let sums = sum_over_rows(out.numel() / columns, columns, &|rows, sums| {
        let range = rows.start * columns..rows.end * columns;
        // SAFETY: each range of `out` is written by one thread, the others are only read.
        unsafe {
            lm_kernels::gelu_backward(slopes.read(range.clone()), given.read(range.clone()), to.write(range), sums);
        }
    })?;
    Ok(vec![out, sums])
}
