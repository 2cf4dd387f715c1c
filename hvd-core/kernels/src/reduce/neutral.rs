//! Elements that change nothing.

use half::{bf16, f16};

use super::ReduceOp;
use crate::dtype::DType;

/// Fills memory with elements that change no other when they are combined with it: zeros for sums, the greatest value for a
/// minimum, and so on.
///
/// # Panics
/// If the memory ends in a part of an element.
pub fn fill_neutral(op: ReduceOp, dtype: DType, out: &mut [u8]) {
    assert_eq!(out.len() % dtype.size(), 0, "a part of a {dtype}");
    let element = neutral(op, dtype);
    out.chunks_exact_mut(dtype.size()).for_each(|out| out.copy_from_slice(&element[..dtype.size()]));
}

/// The neutral element, and bytes that do not matter.
fn neutral(op: ReduceOp, dtype: DType) -> [u8; 8] {
    macro_rules! pick {
        ($zero:expr, $one:expr, $least:expr, $greatest:expr) => {{
            let element = match op {
                ReduceOp::Sum | ReduceOp::Average | ReduceOp::Adasum => $zero,
                ReduceOp::Product => $one,
                ReduceOp::Min => $greatest,
                ReduceOp::Max => $least,
            };
            let mut bytes = [0; 8];
            let element = element.to_ne_bytes();
            bytes[..element.len()].copy_from_slice(&element);
            bytes
        }};
    }
    match dtype {
        DType::F16 => pick!(f16::ZERO, f16::ONE, f16::NEG_INFINITY, f16::INFINITY),
        DType::BF16 => pick!(bf16::ZERO, bf16::ONE, bf16::NEG_INFINITY, bf16::INFINITY),
        DType::F32 => pick!(0f32, 1f32, f32::NEG_INFINITY, f32::INFINITY),
        DType::F64 => pick!(0f64, 1f64, f64::NEG_INFINITY, f64::INFINITY),
        DType::I32 => pick!(0i32, 1i32, i32::MIN, i32::MAX),
        DType::I64 => pick!(0i64, 1i64, i64::MIN, i64::MAX),
        DType::U8 => pick!(0u8, 1u8, u8::MIN, u8::MAX),
        DType::I8 => pick!(0i8, 1i8, i8::MIN, i8::MAX),
        DType::I16 => pick!(0i16, 1i16, i16::MIN, i16::MAX),
        DType::Bool => pick!(0u8, 1u8, 0u8, 1u8),
    }
}

#[cfg(test)]
mod tests {
    use super::super::combine;
    use super::*;

    #[test]
    fn nothing_changes() {
        let ops = [ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product];
        for dtype in DType::ALL {
            for op in ops.into_iter().filter(|op| op.supports(dtype)) {
                // 1 of every type, which an average over one rank leaves alone.
                let mut ones = vec![0; 6 * dtype.size()];
                fill_neutral(ReduceOp::Product, dtype, &mut ones);
                let mut neutral = ones.clone();
                fill_neutral(op, dtype, &mut neutral);
                let op = if op == ReduceOp::Average { ReduceOp::Sum } else { op };
                let mut out = vec![0; ones.len()];
                combine(op, dtype, &mut out, &[&neutral, &ones, &neutral], 1.0);
                assert_eq!(out, ones, "{op:?} of {dtype}");
            }
        }
    }
}
