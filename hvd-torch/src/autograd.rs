//! Gradients and hooks, as far as tch lacks them.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::shim;

/// A closure that runs each time that a backward pass has accumulated into a leaf's gradient; dropping this value
/// removes it.
///
/// It runs once per backward pass, also for a leaf that was used several times; never for one that was not used. On CPU
/// it runs on the thread that called backward, on CUDA on the device's engine thread. A panic in it is caught.
#[derive(Debug)]
pub struct Hook {
    leaf: Tensor,
}

// SAFETY: the tensor is private and only its `drop` uses it.
unsafe impl Sync for Hook {}

impl Hook {
    /// Attaches `hook` to `leaf`.
    ///
    /// # Errors
    /// If `leaf` is not a leaf that requires a gradient, or already has a hook.
    pub fn after_accumulate(leaf: &Tensor, hook: impl Fn() + Send + Sync + 'static) -> Result<Hook> {
        shim::hook_set(leaf, Box::new(hook))?;
        Ok(Hook { leaf: leaf.shallow_clone() })
    }

    /// Has [`accumulate`] begin gradients in `place`, whatever that holds.
    ///
    /// # Errors
    /// If shape, kind or device are not the leaf's.
    pub(crate) fn begin_in(leaf: &Tensor, place: &Tensor) -> Result<()> {
        check_fits(leaf, place)?;
        shim::grad_place(leaf, place)
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        if let Err(error) = shim::hook_remove(&self.leaf) {
            tracing::error!("removing a hook: {error}");
        }
    }
}

/// Makes `grad` the gradient of `leaf`, sharing its elements; `None` removes the gradient.
///
/// A later backward pass accumulates into `grad` in place.
///
/// # Errors
/// If shape, kind or device differ.
pub fn set_grad(leaf: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    grad.map_or(Ok(()), |grad| check_fits(leaf, grad))?;
    shim::grad_set(leaf, grad)
}

fn check_fits(leaf: &Tensor, grad: &Tensor) -> Result<()> {
    match grad.size() == leaf.size() && grad.kind() == leaf.kind() && grad.device() == leaf.device() {
        true => Ok(()),
        false => Err(Error::invalid(format!("a gradient {grad:?} does not fit a parameter {leaf:?}"))),
    }
}

/// The gradient of `leaf`, if it has one.
pub fn grad(leaf: &Tensor) -> Result<Option<Tensor>> {
    Ok(if shim::grad_defined(leaf)? { Some(leaf.f_grad()?) } else { None })
}

/// What a function that adds to a gradient finds there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onto {
    /// Values without meaning, to be written over.
    Nothing,
    /// A gradient, to be added to.
    Gradient,
}

impl Onto {
    /// Adds `values` to `grad`, or begins it with them. No operation is recorded.
    ///
    /// # Errors
    /// With torch's reason, for instance where their shapes differ.
    pub fn add(self, grad: &Tensor, values: &Tensor) -> Result<()> {
        let mut grad = grad.shallow_clone();
        tch::no_grad(|| match self {
            Onto::Nothing => grad.f_copy_(values),
            Onto::Gradient => grad.f_add_(values).map(drop),
        })?;
        Ok(())
    }
}

/// Has `add` add to the gradient of `leaf` in place, or begin it where there is none. For a function given to
/// [`differentiate`] that would otherwise make a large gradient only for torch to add it: it gives an undefined one (`Tensor::new()`)
/// instead. A hook of `leaf` runs as ever, once all functions of the graph that `leaf` went into have done their part.
///
/// # Errors
/// What `add` returns, after which a gradient that it was to begin means nothing; with torch's reason.
pub fn accumulate(leaf: &Tensor, add: impl FnOnce(Tensor, Onto) -> Result<()>) -> Result<()> {
    let onto = if shim::grad_begin(leaf)? { Onto::Nothing } else { Onto::Gradient };
    let grad = leaf.f_grad()?;
    tch::no_grad(|| add(grad, onto))
}

/// Backward from several roots, each with the gradient that comes from outside (`None`: 1, for a scalar root).
///
/// # Errors
/// With torch's reason, for instance where a gradient's shape is not its root's.
pub fn backward(roots: &[(&Tensor, Option<&Tensor>)], retain_graph: bool) -> Result<()> {
    let (roots, grads): (Vec<_>, Vec<_>) = roots.iter().copied().unzip();
    shim::backward(&roots, &grads, retain_graph)
}

/// Whether a backward pass will want the gradient of any of these.
pub fn wanted<'a>(inputs: impl IntoIterator<Item = &'a Tensor>) -> bool {
    shim::grad_enabled() && inputs.into_iter().any(Tensor::requires_grad)
}

/// Has a backward pass through `outputs`, which must be new tensors, call `backward` with their gradients; it gives those of
/// `inputs`, one each (an undefined tensor for none). Nothing happens where no gradient is wanted. A second pass is an error unless the first retains the graph:
/// what `backward` keeps is dropped after it.
///
/// # Errors
/// With torch's reason. What `backward` returns, or that it panicked, is the error of the backward pass.
pub fn differentiate(
    inputs: &[&Tensor],
    outputs: &[Tensor],
    backward: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
) -> Result<()> {
    shim::differentiate(inputs, outputs, Box::new(backward))
}
