//! Layer normalisation of a residual stream, to which what the part before gives is added by the product that makes it.

use half::bf16;
use hvd_torch::autograd::{differentiate, wanted};
use hvd_torch::parallel_for;
use lm_kernels::{ColumnSums, Element, Norm, Normalised};
use tch::{Kind, Tensor};

use super::linear::{Dense, Weight, add_linear, add_product, linear_backward};
use super::span::{Held, Span, sum_over_rows};
use super::{is_served, is_vector, kind_of_products};
use crate::{Error, Result};

/// Rows that are worth a thread.
const GRAIN: usize = 16;

/// The parameters of a layer normalisation over the last dimension.
#[derive(Clone, Copy, Debug)]
pub struct LayerNormOptions<'a> {
    /// Multiplies what was normalised.
    pub weight: &'a Tensor,
    /// Is added then.
    pub bias: &'a Tensor,
    /// Is added to the variance.
    pub eps: f64,
}

impl LayerNormOptions<'_> {
    /// Whether the functions here serve it with this input.
    pub(super) fn is_served(&self, x: &Tensor) -> bool {
        [x, self.weight, self.bias].into_iter().all(is_served)
    }
}

/// Layer normalisation over the last dimension; what goes into products that are ours is in their type.
///
/// # Errors
/// Shapes that do not fit; if torch fails.
pub fn layer_norm(x: &Tensor, norm: LayerNormOptions) -> Result<Tensor> {
    if !norm.is_served(x) {
        let width = x.size().last().copied().unwrap_or(1);
        return Ok(x.f_layer_norm([width], Some(norm.weight), Some(norm.bias), norm.eps, true)?);
    }
    let inputs = [x, norm.weight, norm.bias];
    let (out, saved) = normalise(x.detach(), norm, wanted(inputs))?;
    let out = [out];
    if let Some(saved) = saved {
        differentiate(&inputs, &out, move |grads| {
            let (grad, _, [of_weight, of_bias, _]) = saved.backward(&grads[0], None)?;
            Ok(vec![grad, of_weight, of_bias])
        })?;
    }
    let [out] = out;
    Ok(out)
}

/// [`add_linear`], and [`layer_norm`] of it.
///
/// # Errors
/// Shapes that do not fit; if torch fails.
pub fn add_linear_norm(
    residual: &Tensor,
    x: &Tensor,
    layer: Dense,
    norm: LayerNormOptions,
) -> Result<(Tensor, Tensor)> {
    if !layer.is_served(x) || !norm.is_served(residual) {
        let sum = add_linear(residual, x, layer)?;
        let out = layer_norm(&sum, norm)?;
        return Ok((sum, out));
    }
    let (kept, input) = (Weight::of(layer.weight), x.detach());
    let sum = add_product(residual, &input, &kept, layer.bias)?;
    let inputs = [residual, x, layer.weight, layer.bias, norm.weight, norm.bias];
    // What backward keeps must not hold the result's node, which holds it.
    let (out, saved) = normalise(sum.detach(), norm, wanted(inputs))?;
    let results = [sum, out];
    if let Some(saved) = saved {
        differentiate(&inputs, &results, move |grads| {
            let (grad, narrow_grad, [of_scale, of_shift, of_bias]) = saved.backward(&grads[1], Some(&grads[0]))?;
            let [of_x, of_weight] = linear_backward(narrow_grad.as_ref().unwrap_or(&grad), &input, &kept)?;
            Ok(vec![grad, of_x, of_weight, of_bias, of_scale, of_shift])
        })?;
    }
    let [sum, out] = results;
    Ok((sum, out))
}

/// What the backward pass of a normalisation needs.
pub(super) struct Saved {
    rows: Tensor,
    /// (rows, 2)
    moments: Tensor,
    weight: Tensor,
}

/// The normalised rows, and what a backward pass needs, where there will be one.
pub(super) fn normalise(rows: Tensor, norm: LayerNormOptions, wanted: bool) -> Result<(Tensor, Option<Saved>)> {
    let (weight, bias) = (norm.weight.detach(), norm.bias.detach());
    if !is_vector(&weight, &rows) || !is_vector(&bias, &rows) {
        return Err(Error::Config(format!("a normalisation of {rows:?} by {weight:?} and {bias:?}")));
    }
    let count = rows.numel() / weight.numel();
    let out = Tensor::f_empty(rows.size(), (kind_of_products().unwrap_or(Kind::Float), rows.device()))?;
    let moments = wanted.then(|| Tensor::f_empty([count as i64, 2], (Kind::Float, rows.device()))).transpose()?;
    let given = [&rows, &weight, &bias];
    match out.kind() {
        Kind::BFloat16 => normalise_into::<bf16>(given, norm.eps, &out, moments.as_ref())?,
        _ => normalise_into::<f32>(given, norm.eps, &out, moments.as_ref())?,
    }
    Ok((out, moments.map(|moments| Saved { rows, moments, weight })))
}

fn normalise_into<E: Element + Held>(
    [rows, weight, bias]: [&Tensor; 3],
    eps: f64,
    out: &Tensor,
    moments: Option<&Tensor>,
) -> hvd_torch::Result<()> {
    let columns = weight.numel();
    let (from, to, kept) = (Span::of(rows), Span::<E>::of(out), moments.map(Span::of));
    let (weight_values, bias_values) = (Span::of(weight), Span::of(bias));
    parallel_for(rows.numel() / columns, GRAIN, &|rows| {
        let range = rows.start * columns..rows.end * columns;
        // SAFETY: each range of `out` and of the moments is written by one thread, the others are only read.
        unsafe {
            let (weight, bias) = (weight_values.all(), bias_values.all());
            let norm = Norm { weight, bias, eps: eps as f32 };
            let moments = kept.as_ref().map(|kept| kept.write(2 * rows.start..2 * rows.end).as_chunks_mut().0);
            lm_kernels::normalise(from.read(range.clone()), norm, to.write(range), moments);
        }
    })
}

/// What [`Saved::backward`] gives.
pub(super) type Gradients = (Tensor, Option<Tensor>, [Tensor; 3]);

impl Saved {
    /// The gradient of the rows, of which `direct` is what reaches them past the normalisation, and the same in bf16 where `grad` is that and a
    /// product follows; and the gradients of weight, bias, and of whatever was added to each row.
    pub(super) fn backward(&self, grad: &Tensor, direct: Option<&Tensor>) -> hvd_torch::Result<Gradients> {
        match grad.kind() {
            Kind::BFloat16 => self.backward_of::<bf16>(grad, direct),
            _ => self.backward_of::<f32>(grad, direct),
        }
    }

    fn backward_of<E: Element + Held>(&self, grad: &Tensor, direct: Option<&Tensor>) -> hvd_torch::Result<Gradients> {
        let grad = grad.f_contiguous()?;
        let narrow = match direct.is_some() && grad.kind() == Kind::BFloat16 {
            true => Some(Tensor::f_empty(self.rows.size(), (Kind::BFloat16, self.rows.device()))?),
            false => None,
        };
        let kept = narrow.as_ref().map(Span::<bf16>::of);
        let direct = direct.map(Tensor::f_contiguous).transpose()?;
        let out = self.rows.f_empty_like()?;
        let columns = self.weight.numel();
        let (rows_of, moments, weight) = (Span::of(&self.rows), Span::of(&self.moments), Span::of(&self.weight));
        let (grad, direct, to) = (Span::<E>::of(&grad), direct.as_ref().map(Span::of), Span::of(&out));
        let sums = sum_over_rows(out.numel() / columns, 3 * columns, &|rows, sums| {
            let range = rows.start * columns..rows.end * columns;
            let (of_weight, rest) = sums.split_at_mut(columns);
            let (of_bias, of_rows) = rest.split_at_mut(columns);
            // SAFETY: as above.
            unsafe {
                let given = Normalised {
                    rows: rows_of.read(range.clone()),
                    moments: moments.read(2 * rows.start..2 * rows.end).as_chunks().0,
                    weight: weight.all(),
                    grad: grad.read(range.clone()),
                };
                let direct = direct.as_ref().map(|direct| direct.read(range.clone()));
                let sums = ColumnSums { weight: of_weight, bias: of_bias, rows: of_rows };
                let narrow = kept.as_ref().map(|kept| kept.write(range.clone()));
                lm_kernels::normalise_backward(given, direct, to.write(range), narrow, sums);
            }
        })?;
        let part = |at: i64| sums.f_narrow(0, at * columns as i64, columns as i64);
        Ok((out, narrow, [part(0)?, part(1)?, part(2)?]))
    }
}
