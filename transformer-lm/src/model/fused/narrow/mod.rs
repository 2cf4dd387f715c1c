//! Dense layers, attention and the head in bf16: what goes into products is rounded to bf16, sums are in f32, and what becomes of a sum
//! becomes of it while it is in the cache.

pub(super) mod attention;
mod head;
mod product;
mod transposed;

use half::bf16;
use tch::{Kind, Tensor};

use super::linear::Weight;
use super::span::Span;
use crate::{Error, Result};
use product::{Left, Panels, product};
use transposed::add_transposed;

pub(super) use head::linear_cross_entropy;

/// `x · weightᵀ`, `+ bias` where there is one, in bf16.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, width) = result(x, weight, bias, Kind::BFloat16)?;
    let (to, bias) = (Span::<bf16>::of(&out), bias.map(Span::of));
    product(&Left::rows(x)?, &Panels::of_columns(weight)?, &|block| {
        // SAFETY: each block of the result is written once, and `product` waits for what is streamed; the bias is only read.
        unsafe {
            let bias = bias.as_ref().map(|bias| bias.read(block.columns()));
            lm_kernels::store(block.sums, bias, to.result(block.rows(), block.columns(), width));
        }
    })?;
    Ok(out)
}

/// GELU of `x · weightᵀ + bias` in bf16, and its slopes there, if they are wanted.
pub(super) fn linear_gelu(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    wanted: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (out, width) = result(x, weight, Some(bias), Kind::BFloat16)?;
    let slopes = wanted.then(|| out.f_empty_like()).transpose()?;
    let (to, bias, kept) = (Span::<bf16>::of(&out), Span::of(bias), slopes.as_ref().map(Span::<bf16>::of));
    product(&Left::rows(x)?, &Panels::of_columns(weight)?, &|block| {
        // SAFETY: as above.
        unsafe {
            let slopes = kept.as_ref().map(|kept| kept.result(block.rows(), block.columns(), width));
            let out = to.result(block.rows(), block.columns(), width);
            lm_kernels::gelu(block.sums, bias.read(block.columns()), out, slopes);
        }
    })?;
    Ok((out, slopes))
}

/// `residual + (x · weightᵀ + bias)` in f32.
pub(super) fn add_product(residual: &Tensor, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (out, width) = result(x, weight, Some(bias), Kind::Float)?;
    if residual.size() != out.size() {
        return Err(Error::Config(format!("{out:?} cannot be added to {residual:?}")));
    }
    let (to, from, bias) = (Span::<f32>::of(&out), Span::<f32>::of(&residual.f_contiguous()?), Span::of(bias));
    product(&Left::rows(x)?, &Panels::of_columns(weight)?, &|block| {
        // SAFETY: as above; the residual is only read.
        unsafe {
            let base = from.view(block.rows(), block.columns(), width);
            let out = to.result(block.rows(), block.columns(), width);
            lm_kernels::add_to(base, block.sums, bias.read(block.columns()), out);
        }
    })?;
    Ok(out)
}

/// The gradients of input, in bf16, and weight; where the input comes from an activation that had these slopes, of what went into that.
pub(super) fn linear_backward(
    grad: &Tensor,
    x: &Tensor,
    weight: &Weight,
    slopes: Option<&Tensor>,
) -> hvd_torch::Result<[Tensor; 2]> {
    let grad = grad.f_to_kind(Kind::BFloat16)?;
    let of_x = Tensor::f_empty(x.size(), (Kind::BFloat16, x.device()))?;
    let (to, width) = (Span::<bf16>::of(&of_x), weight.values.size()[1] as usize);
    let slopes = slopes.map(Span::<bf16>::of);
    product(&Left::rows(&grad)?, &Panels::of_rows(&weight.values)?, &|block| {
        // SAFETY: as above; the slopes are only read.
        unsafe {
            let out = to.result(block.rows(), block.columns(), width);
            match &slopes {
                Some(slopes) => {
                    lm_kernels::multiply_by(slopes.view(block.rows(), block.columns(), width), block.sums, out);
                }
                None => lm_kernels::store(block.sums, None, out),
            }
        };
    })?;
    let columns = weight.values.size()[0] as usize;
    let of_weight = weight.gradient(|sum, onto| add_transposed((&sum, onto), 1.0, &grad, [columns; 2], x))?;
    Ok([of_x, of_weight])
}

/// Room for `x · weightᵀ + bias`, and its width.
fn result(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, kind: Kind) -> Result<(Tensor, usize)> {
    let misfit = || Error::Config(format!("a layer of {weight:?} and {bias:?} for {x:?}"));
    let &[width, depth] = &weight.size()[..] else { return Err(misfit()) };
    let mut size = x.size();
    match size.last_mut() {
        Some(last) if *last == depth && bias.is_none_or(|bias| bias.size() == [width]) => *last = width,
        _ => return Err(misfit()),
    }
    Ok((Tensor::f_empty(size, (kind, x.device()))?, width as usize))
}
