//! What the ranks put in, and what a plain computation says must come out.

use half::{bf16, f16};
use hvd_core::{Compression, DType, Element, ReduceOp};

/// An element that can be made from a small whole number and looked at as one.
pub trait Value: Element {
    /// The number, wrapped around where it is too large for an integer type.
    fn of(number: f64) -> Self;

    /// The number that it stands for.
    fn number(self) -> f64;
}

macro_rules! values {
    ($($type:ty: $of:expr, $number:expr;)*) => {$(
        impl Value for $type {
            fn of(number: f64) -> Self {
                $of(number)
            }

            fn number(self) -> f64 {
                $number(self)
            }
        }
    )*};
}

values!(
    f16: f16::from_f64, f16::to_f64;
    bf16: bf16::from_f64, bf16::to_f64;
    f32: |x| x as f32, f64::from;
    f64: |x| x, |x| x;
    i32: |x| x as i64 as i32, f64::from;
    i64: |x| x as i64, |x| x as f64;
    u8: |x| x as i64 as u8, f64::from;
    i8: |x| x as i64 as i8, f64::from;
    i16: |x| x as i64 as i16, f64::from;
);

/// What `rank` puts in at `index`. Small whole numbers, so that sums are exact in every type; of a product mostly ones, so that it
/// stays within range; of Adasum the same on all ranks.
pub fn input(op: ReduceOp, rank: usize, index: usize) -> f64 {
    match op {
        ReduceOp::Adasum => (1 + index % 7) as f64,
        ReduceOp::Product => 1.0 + f64::from(u8::from((index + rank).is_multiple_of(4))),
        _ => ((3 * index + 5 * rank) % 7) as f64,
    }
}

/// What must come out at `index` of a reduction over `ranks` ranks.
pub fn reduced(op: ReduceOp, dtype: DType, ranks: usize, index: usize) -> f64 {
    let inputs = (0..ranks).map(|rank| input(op, rank, index));
    match op {
        ReduceOp::Sum => inputs.sum(),
        ReduceOp::Average if dtype.is_float() => inputs.sum::<f64>() / ranks as f64,
        ReduceOp::Average => (inputs.sum::<f64>() / ranks as f64).floor(),
        ReduceOp::Min => inputs.fold(f64::INFINITY, f64::min),
        ReduceOp::Max => inputs.fold(f64::NEG_INFINITY, f64::max),
        ReduceOp::Product => inputs.product(),
        // Adasum of equal tensors is that tensor.
        ReduceOp::Adasum => input(op, 0, index),
    }
}

/// By how much a result may be off, relative to its size: what each of the ranks may round away in the type that travels.
pub fn tolerance(dtype: DType, compression: Compression, ranks: usize) -> f64 {
    let epsilon = match compression.wire_dtype(dtype) {
        DType::F16 => f64::from(f16::EPSILON),
        DType::BF16 => f64::from(bf16::EPSILON),
        DType::F32 => f64::from(f32::EPSILON),
        DType::F64 => f64::EPSILON,
        _ => 0.0,
    };
    ranks as f64 * epsilon
}

/// Elements of `got` that differ from `expected(index)` by more than `tolerance` allows.
pub fn count_wrong<T: Value>(got: &[T], tolerance: f64, expected: impl Fn(usize) -> f64) -> u64 {
    let wrong = |&(index, &got): &(usize, &T)| {
        let expected = T::of(expected(index)).number();
        let off = (got.number() - expected).abs();
        off.is_nan() || off > tolerance * expected.abs()
    };
    got.iter().enumerate().filter(wrong).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_elements_are_counted() {
        assert_eq!(count_wrong(&[1.0f32, 2.0, f32::NAN, 4.5], 0.0, |index| index as f64 + 1.0), 2);
        assert_eq!(count_wrong(&[1.0f32, 2.001], 0.01, |index| index as f64 + 1.0), 0);
        assert_eq!(count_wrong(&[(300 - 256) as u8], 0.0, |_| 300.0), 0);
    }

    #[test]
    fn ranks_put_in_different_things() {
        for op in [ReduceOp::Sum, ReduceOp::Product] {
            assert!((0..8).any(|index| input(op, 0, index) != input(op, 1, index)));
        }
        assert_eq!(reduced(ReduceOp::Average, DType::I32, 2, 0), 2.0);
        assert_eq!(reduced(ReduceOp::Average, DType::F32, 2, 0), 2.5);
    }
}
