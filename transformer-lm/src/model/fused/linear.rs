//! Dense layers, and gradients of weights that are added where they are kept.

use half::bf16;
use hvd_torch::autograd::{Onto, accumulate, differentiate, wanted};
use hvd_torch::parallel_for;
use lm_kernels::Element;
use tch::{Kind, Tensor};

use super::narrow;
use super::span::{Held, Span, sum_over_rows};
use super::{is_quick, is_served, is_vector, kind_of_products};
use crate::{Error, Result};

/// A weight as a backward pass needs it.
pub(super) struct Weight {
    pub(super) values: Tensor,
    /// The weight itself, where it is one that keeps its gradient.
    leaf: Option<Tensor>,
}

impl Weight {
    pub(super) fn of(weight: &Tensor) -> Self {
        let keeps = weight.is_leaf() && weight.requires_grad();
        Self { values: weight.detach(), leaf: keeps.then(|| weight.shallow_clone()) }
    }

    /// What a backward function gives for the gradient that `add` adds to a tensor of the weight's shape: it is added where it is kept, so
    /// that no tensor is made which torch would only add.
    pub(super) fn gradient(
        &self,
        add: impl FnOnce(Tensor, Onto) -> hvd_torch::Result<()>,
    ) -> hvd_torch::Result<Tensor> {
        match &self.leaf {
            Some(leaf) => accumulate(leaf, add).map(|()| Tensor::new()),
            None => {
                let sum = self.values.f_empty_like()?;
                add(sum.shallow_clone(), Onto::Nothing)?;
                Ok(sum)
            }
        }
    }
}

/// A dense layer's parameters: the weight (out, in), the bias (out).
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    /// Multiplies the input.
    pub weight: &'a Tensor,
    /// Is added.
    pub bias: &'a Tensor,
}

impl Dense<'_> {
    /// Whether the functions here serve it with this input.
    pub(super) fn is_served(&self, x: &Tensor) -> bool {
        is_quick(x, self.weight) && is_served(self.bias)
    }
}

/// `x · weightᵀ`, and `+ bias` where there is one.
///
/// # Errors
/// If torch fails, for instance as shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    let is_narrow = x.kind() == Kind::BFloat16;
    if !is_quick(x, weight) || !bias.is_none_or(is_served) || !(is_narrow || wanted(inputs.iter().copied())) {
        return Ok(x.f_linear(weight, bias)?);
    }
    let kept = Weight::of(weight);
    let (input, bias_values) = (x.detach(), bias.map(Tensor::detach));
    let out = [match is_narrow {
        true => narrow::linear(&input, &kept.values, bias_values.as_ref())?,
        false => input.f_linear(&kept.values, bias_values.as_ref())?,
    }];
    let with_bias = bias.is_some();
    differentiate(&inputs, &out, move |grads| {
        let grad = grads[0].f_contiguous()?;
        let mut made = Vec::from(linear_backward(&grad, &input, &kept)?);
        if with_bias {
            made.push(sum_rows(&grad)?);
        }
        Ok(made)
    })?;
    let [out] = out;
    Ok(out)
}

/// The gradients of input and weight.
pub(super) fn linear_backward(grad: &Tensor, x: &Tensor, weight: &Weight) -> hvd_torch::Result<[Tensor; 2]> {
    if x.kind() == Kind::BFloat16 {
        return narrow::linear_backward(grad, x, weight, None);
    }
    let grad = rows_of(grad)?;
    let of_x = grad.f_mm(&weight.values)?.f_view(&*x.size())?;
    let of_weight = weight.gradient(|sum, onto| add_matrices(&sum, onto, &grad.f_tr()?, &rows_of(x)?))?;
    Ok([of_x, of_weight])
}

/// `residual + (x · weightᵀ + bias)`.
///
/// # Errors
/// If torch fails, for instance as shapes do not fit.
pub fn add_linear(residual: &Tensor, x: &Tensor, layer: Dense) -> Result<Tensor> {
    if !layer.is_served(x) || !is_served(residual) {
        return Ok(residual.f_add(&x.f_linear(layer.weight, Some(layer.bias))?)?);
    }
    let (kept, input) = (Weight::of(layer.weight), x.detach());
    let out = [add_product(residual, &input, &kept, layer.bias)?];
    differentiate(&[residual, x, layer.weight, layer.bias], &out, move |grads| {
        let grad = grads[0].f_contiguous()?;
        let of_bias = sum_rows(&grad)?;
        let [of_x, of_weight] = linear_backward(&grad, &input, &kept)?;
        Ok(vec![grad, of_x, of_weight, of_bias])
    })?;
    let [out] = out;
    Ok(out)
}

/// The product is added to what it is to be added to: nobody writes it, and reads it again.
pub(super) fn add_product(residual: &Tensor, x: &Tensor, weight: &Weight, bias: &Tensor) -> Result<Tensor> {
    if !is_vector(bias, residual) {
        return Err(Error::Config(format!("a bias of {bias:?} for {residual:?}")));
    }
    if x.kind() == Kind::BFloat16 {
        return narrow::add_product(&residual.detach(), x, &weight.values, &bias.detach());
    }
    let sum = residual.detach().f_add(&bias.detach())?;
    let _ = rows_of(&sum)?.f_addmm_(&rows_of(x)?, &weight.values.f_tr()?)?;
    Ok(sum)
}

/// `sum = a · b`, or adds that.
pub(super) fn add_matrices(sum: &Tensor, onto: Onto, a: &Tensor, b: &Tensor) -> hvd_torch::Result<()> {
    let _ = tch::no_grad(|| match onto {
        Onto::Nothing => a.f_mm_out(sum, b),
        Onto::Gradient => sum.shallow_clone().f_addmm_(a, b),
    })?;
    Ok(())
}

/// A matrix whose rows are those of the last dimension.
fn rows_of(tensor: &Tensor) -> hvd_torch::Result<Tensor> {
    Ok(tensor.f_view([-1, tensor.size().last().copied().unwrap_or(1)])?)
}

/// The sum of all rows of the last dimension, in f32.
pub(super) fn sum_rows(grad: &Tensor) -> hvd_torch::Result<Tensor> {
    match grad.kind() {
        Kind::BFloat16 => sum_rows_of::<bf16>(grad),
        _ => sum_rows_of::<f32>(grad),
    }
}

fn sum_rows_of<E: Element + Held>(grad: &Tensor) -> hvd_torch::Result<Tensor> {
    let columns = grad.size().last().map_or(1, |columns| *columns as usize);
    let values = Span::<E>::of(grad);
    sum_over_rows(grad.numel() / columns, columns, &|rows, sums| {
        // SAFETY: the gradient is only read.
        lm_kernels::add_rows(unsafe { values.read(rows.start * columns..rows.end * columns) }, sums);
    })
}

/// The rows of `weight` (vocabulary, D) for `ids`, int64.
///
/// # Errors
/// Where an id is not in the vocabulary; if torch fails.
pub fn embedding(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if !wanted([weight]) || kind_of_products().is_none() || !is_served(weight) {
        return Ok(Tensor::f_embedding(weight, ids, -1, false, false)?);
    }
    let kept = Weight::of(weight);
    let out = [Tensor::f_embedding(&kept.values, ids, -1, false, false)?];
    let ids = Vec::<i64>::try_from(ids.f_reshape([-1])?)?;
    differentiate(&[weight], &out, move |grads| {
        let grad = grads[0].f_contiguous()?;
        Ok(vec![kept.gradient(|mut sum, onto| {
            if onto == Onto::Nothing {
                let _ = sum.f_zero_()?;
            }
            add_to_rows(&sum, &ids, &grad)
        })?])
    })?;
    let [out] = out;
    Ok(out)
}

/// Columns that are worth a thread.
const COLUMNS: usize = 128;

/// Adds rows to those of `sum` that `ids` say; each thread takes some columns.
fn add_to_rows(sum: &Tensor, ids: &[i64], rows: &Tensor) -> hvd_torch::Result<()> {
    let columns = sum.size()[1] as usize;
    let (into, from) = (Span::of(sum), Span::<f32>::of(rows));
    parallel_for(columns, COLUMNS, &|part| {
        for (row, id) in ids.iter().enumerate() {
            let place = |row: usize| row * columns + part.start..row * columns + part.end;
            // SAFETY: a column is written by one thread; `rows` is only read.
            unsafe { lm_kernels::add_rows(from.read(place(row)), into.write(place(*id as usize))) };
        }
    })
}
