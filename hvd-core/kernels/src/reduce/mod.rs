//! Kernels that combine elements.
//!
//! All take bytes and an element type, need no alignment, and give bits that depend on their arguments alone, not on
//! the CPU. Integers wrap on overflow, as Rust's `wrapping_add` and the C types of other runtimes do; the 16-bit floats
//! are computed in f32 and rounded once per call; a bool is 0 or 1. A minimum or maximum is NaN if any input is;
//! every NaN that comes out is the same one.

mod adasum;
mod kernels;
mod neutral;

use std::marker::PhantomData;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::simd::dispatch;
use crate::wire::lane::{Factor, Lane, Number, with_lane};
pub use adasum::{Products, blend};
use kernels::{Accumulate, Combine, Gather, Greatest, Least, Meet, Plus, Times};
pub use neutral::fill_neutral;

/// How the ranks' elements are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The sum divided by the number of ranks; integers floor.
    Average,
    /// The least.
    Min,
    /// The greatest.
    Max,
    /// The product.
    Product,
    /// A sum that adapts to how much the ranks agree, tensor by tensor: see [`ReduceOp::is_elementwise`].
    Adasum,
}

impl ReduceOp {
    /// Whether the operation is defined for elements of `dtype`: everything for 16-bit floats and up and 32-bit
    /// integers and up; sum, min and max for the small integers; min (and) and max (or) for bool. Adasum is defined for
    /// floats.
    pub const fn supports(self, dtype: DType) -> bool {
        match dtype {
            _ if !self.is_elementwise() => dtype.is_float(),
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 | DType::I32 | DType::I64 => true,
            DType::U8 | DType::I8 | DType::I16 => matches!(self, ReduceOp::Sum | ReduceOp::Min | ReduceOp::Max),
            DType::Bool => matches!(self, ReduceOp::Min | ReduceOp::Max),
        }
    }

    /// Whether an element of the result depends on that element alone. Adasum weighs whole tensors by their inner products:
    /// the kernels here do not serve it.
    pub const fn is_elementwise(self) -> bool {
        !matches!(self, ReduceOp::Adasum)
    }
}

/// What an allreduce does to each element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reduction {
    /// Element type of the buffer, as it travels.
    pub dtype: DType,
    /// How elements are combined. `Average` of integers floors; `Average` of floats divides by the number of ranks.
    pub op: ReduceOp,
    /// Floats are multiplied by this once they are combined, before the chunk's owner rounds them. 1 for none.
    pub scale: f64,
}

impl Reduction {
    /// Only the operation, without a scale.
    pub const fn new(dtype: DType, op: ReduceOp) -> Self {
        Reduction { dtype, op, scale: 1.0 }
    }

    /// What is left to do to elements that `ranks` ranks have combined.
    fn factor(&self, ranks: usize) -> Factor {
        let divide = if self.op == ReduceOp::Average { ranks.max(1) as f64 } else { 1.0 };
        Factor { multiply: self.scale, divide }
    }
}

/// Picks the operation's type for a generic function.
macro_rules! with_op {
    ($op:expr, $name:ident => $body:expr) => {{
        macro_rules! arm {
            ($type:ident) => {{
                type $name = $type;
                $body
            }};
        }
        match $op {
            // `check` has refused Adasum.
            ReduceOp::Sum | ReduceOp::Average | ReduceOp::Adasum => arm!(Plus),
            ReduceOp::Min => arm!(Least),
            ReduceOp::Max => arm!(Greatest),
            ReduceOp::Product => arm!(Times),
        }
    }};
}

/// `into = into ∘ from`, element by element. Average only adds: [`finish`] divides.
///
/// # Panics
/// If the lengths differ, end in a part of an element, or the type has no such operation.
pub fn accumulate(op: ReduceOp, dtype: DType, into: &mut [u8], from: &[u8]) {
    check(op, dtype, into, from);
    with_lane!(dtype, L => with_op!(op, O => accumulate_lane::<L, O>(into, from)))
}

fn accumulate_lane<L: Lane, O: Combine<L::Wide>>(into: &mut [u8], from: &[u8]) {
    let (into, from) = (bytemuck::cast_slice_mut(into), bytemuck::cast_slice(from));
    dispatch(Accumulate::<L, O> { into, from, op: PhantomData });
}

/// `out = (inputs[0] ∘ inputs[1] ∘ …) · scale`, element by element and in this order; Average also divides by the
/// number of inputs. Integers are not scaled.
///
/// A 16-bit float is rounded once, at the end. A factor that f32 cannot hold (a third) is applied in f64.
///
/// # Panics
/// If there is no input, the lengths differ or end in a part of an element, or the type has no such operation.
pub fn combine(op: ReduceOp, dtype: DType, out: &mut [u8], inputs: &[&[u8]], scale: f64) {
    assert!(!inputs.is_empty(), "nothing to combine");
    for input in inputs {
        check(op, dtype, out, input);
    }
    let factor = Reduction { dtype, op, scale }.factor(inputs.len());
    with_lane!(dtype, L => with_op!(op, O => combine_lane::<L, O>(out, inputs, factor)))
}

fn combine_lane<L: Lane, O: Combine<L::Wide>>(out: &mut [u8], inputs: &[&[u8]], factor: Factor) {
    let (out, op) = (bytemuck::cast_slice_mut(out), PhantomData);
    match L::Wide::cheap(factor) {
        Some(finish) => dispatch(Gather::<L, O, _> { out, inputs, finish, op }),
        None => dispatch(Gather::<L, O, _> { out, inputs, finish: L::Wide::thorough(factor), op }),
    }
}

/// As [`combine`] of two inputs, with the result in place of both.
///
/// # Panics
/// As [`combine`].
pub fn combine_both(op: ReduceOp, dtype: DType, first: &mut [u8], second: &mut [u8], scale: f64) {
    check(op, dtype, first, second);
    let factor = Reduction { dtype, op, scale }.factor(2);
    with_lane!(dtype, L => with_op!(op, O => meet_lane::<L, O>(first, second, factor)))
}

fn meet_lane<L: Lane, O: Combine<L::Wide>>(first: &mut [u8], second: &mut [u8], factor: Factor) {
    let (first, second, op) = (bytemuck::cast_slice_mut(first), bytemuck::cast_slice_mut(second), PhantomData);
    match L::Wide::cheap(factor) {
        Some(finish) => dispatch(Meet::<L, O, _> { first, second, finish, op }),
        None => dispatch(Meet::<L, O, _> { first, second, finish: L::Wide::thorough(factor), op }),
    }
}

/// Divides (Average) and scales what `ranks` ranks have combined with [`accumulate`]. Does nothing where nothing is
/// left to do.
///
/// # Panics
/// If the buffer ends in a part of an element.
pub fn finish(reduction: &Reduction, ranks: usize, data: &mut [u8]) {
    crate::wire::finish(reduction.dtype, data, reduction.factor(ranks));
}

fn check(op: ReduceOp, dtype: DType, into: &[u8], from: &[u8]) {
    assert!(op.supports(dtype) && op.is_elementwise(), "{op:?} of {dtype} is not defined");
    assert_eq!(into.len(), from.len(), "lengths of the buffers to combine");
    assert_eq!(into.len() % dtype.size(), 0, "a part of a {dtype}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Level, dispatch_at};

    /// Any bit patterns, numbers of moderate size among them.
    fn patterns(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            state >> 32
        };
        (0..len)
            .map(|_| if next() % 8 == 0 { [0, 0x7f, 0xff, 0x80][next() as usize % 4] } else { next() as u8 })
            .collect()
    }

    fn gathered<L: Lane, O: Combine<L::Wide>>(level: Level, inputs: &[&[u8]], factor: Factor) -> Vec<u8> {
        let mut bytes = vec![0; inputs[0].len()];
        let (out, op) = (bytemuck::cast_slice_mut(&mut bytes), PhantomData);
        match L::Wide::cheap(factor) {
            Some(finish) => dispatch_at(level, Gather::<L, O, _> { out, inputs, finish, op }),
            None => dispatch_at(level, Gather::<L, O, _> { out, inputs, finish: L::Wide::thorough(factor), op }),
        }
        bytes
    }

    /// The other two loops: `into ∘ from`, then both of them with the result.
    fn pairs<L: Lane, O: Combine<L::Wide>>(level: Level, inputs: &[&[u8]]) -> [Vec<u8>; 3] {
        let [mut into, mut first, mut second] = [inputs[0], inputs[0], inputs[1]].map(<[u8]>::to_vec);
        let (from, op) = (bytemuck::cast_slice(inputs[1]), PhantomData);
        dispatch_at(level, Accumulate::<L, O> { into: bytemuck::cast_slice_mut(&mut into), from, op });
        let finish = L::Wide::thorough(Factor { multiply: 1.0, divide: 3.0 });
        let both = (bytemuck::cast_slice_mut(&mut first), bytemuck::cast_slice_mut(&mut second));
        dispatch_at(level, Meet::<L, O, _> { first: both.0, second: both.1, finish, op });
        [into, first, second]
    }

    #[test]
    fn the_bits_do_not_depend_on_the_cpu() {
        for dtype in DType::ALL {
            let inputs: Vec<_> = (0..4).map(|seed| patterns(seed, 5003 * dtype.size())).collect();
            let inputs: Vec<_> = inputs.iter().map(|input| &input[..]).collect();
            for op in [ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product] {
                let results: Vec<_> = Level::available()
                    .map(|level| with_lane!(dtype, L => with_op!(op, O => pairs::<L, O>(level, &inputs))))
                    .collect();
                assert!(results.iter().all(|result| *result == results[0]), "{op:?} of two {dtype}");
                for (count, divide) in [(1, 1.0), (2, 1.0), (2, 2.0), (3, 3.0), (4, 7.0)] {
                    let factor = Factor { multiply: 1.0, divide };
                    let results: Vec<_> = Level::available()
                        .map(|level| with_lane!(dtype, L => with_op!(op, O => gathered::<L, O>(level, &inputs[..count], factor))))
                        .collect();
                    for (at, result) in results.iter().enumerate() {
                        assert!(*result == results[0], "{op:?} of {count} {dtype} over {divide}: level {at} differs");
                    }
                }
            }
        }
    }
}
