//! Operations on lists of tensors, in one call each.

use tch::Tensor;

use crate::error::Result;
use crate::shim;

/// Sets all elements to zero.
pub fn zero_(tensors: &[Tensor]) -> Result<()> {
    shim::foreach_zero(tensors)
}

/// Multiplies all elements by `factor`.
pub fn mul_(tensors: &[Tensor], factor: f64) -> Result<()> {
    shim::foreach_mul(tensors, factor)
}

/// The 2-norm of each tensor, with torch's precision and order of summation, which depends on the number of threads.
pub fn norm(tensors: &[Tensor]) -> Result<Vec<f64>> {
    shim::foreach_norm(tensors)
}

/// The 2-norm of all elements of contiguous tensors together, summed in f64.
///
/// The order of summation depends on the lengths alone: with the same elements every rank gets the same bits, whatever
/// its number of threads or its processor.
pub fn total_norm(tensors: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for tensor in tensors {
        sum += shim::squared_norm(tensor)?;
    }
    Ok(sum.sqrt())
}

/// Scales gradients in place so that their norm, `total_norm`, is at most `max_norm`.
///
/// The coefficient is torch's, `max_norm / (total_norm + 1e-6)` where that is below 1, in f64. A norm that is infinite or NaN leaves the gradients as they are: the caller sees
/// it and skips the step.
pub fn clip_(tensors: &[Tensor], total_norm: f64, max_norm: f64) -> Result<()> {
    let coefficient = max_norm / (total_norm + 1e-6);
    if total_norm.is_finite() && coefficient < 1.0 {
        mul_(tensors, coefficient)?;
    }
    Ok(())
}
