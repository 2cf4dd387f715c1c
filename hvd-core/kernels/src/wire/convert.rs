//! Copies that convert and multiply.

use std::marker::PhantomData;

use super::lane::{Factor, Finish, GROUP, Keep, Lane, Number, lanes, with_lane};
use super::sixteen;
use crate::dtype::DType;
use crate::simd::{Isa, Kernel, dispatch};

/// Copies elements of one float type to another, multiplied by `factor`: f32 and f64 to f16 and bf16 and back. Between
/// equal types it is a plain copy for a factor of 1, works for all of them, and integers ignore the factor.
///
/// One rounding to the nearest, ties to even, after the multiplication, which happens in f32 if both types fit in it
/// and in f64 otherwise. Too large becomes infinity; a NaN stays one but loses sign and payload, except in a plain copy.
/// Buffers need no alignment.
///
/// # Panics
/// If the types are none of those pairs, or the buffers do not hold equally many elements.
pub fn convert(src_dtype: DType, src: &[u8], dst_dtype: DType, dst: &mut [u8], factor: f64) {
    let elements = src.len() / src_dtype.size();
    assert_eq!(src.len(), elements * src_dtype.size(), "a part of a {src_dtype}");
    assert_eq!(dst.len(), elements * dst_dtype.size(), "length of the {dst_dtype} copy of {elements} elements");
    match (src_dtype, dst_dtype) {
        (from, to) if from == to => copy(from, src, dst, factor),
        (DType::F32, DType::F16) => via_f32::<lanes::F32, lanes::F16>(src, dst, factor),
        (DType::F32, DType::BF16) => via_f32::<lanes::F32, lanes::BF16>(src, dst, factor),
        (DType::F16, DType::F32) => via_f32::<lanes::F16, lanes::F32>(src, dst, factor),
        (DType::BF16, DType::F32) => via_f32::<lanes::BF16, lanes::F32>(src, dst, factor),
        (DType::F64, DType::F16) => through::<lanes::F64, lanes::F16, f64>(src, dst, factor),
        (DType::F64, DType::BF16) => through::<lanes::F64, lanes::BF16, f64>(src, dst, factor),
        (DType::F16, DType::F64) => through::<lanes::F16, lanes::F64, f64>(src, dst, factor),
        (DType::BF16, DType::F64) => through::<lanes::BF16, lanes::F64, f64>(src, dst, factor),
        (from, to) => panic!("no conversion from {from} to {to}"),
    }
}

/// Multiplies floats in place; integers stay as they are.
///
/// # Panics
/// If the buffer ends in a part of an element.
pub fn scale(dtype: DType, data: &mut [u8], factor: f64) {
    finish(dtype, data, Factor::times(factor));
}

/// Multiplies and divides in place.
pub(crate) fn finish(dtype: DType, data: &mut [u8], factor: Factor) {
    if factor.is_one() {
        return;
    }
    with_lane!(dtype, L => {
        let data = bytemuck::cast_slice_mut(data);
        match <L as Lane>::Wide::cheap(factor) {
            Some(finish) => dispatch(InPlace::<L, _> { data, finish }),
            None => dispatch(InPlace::<L, _> { data, finish: <L as Lane>::Wide::thorough(factor) }),
        }
    })
}

fn copy(dtype: DType, src: &[u8], dst: &mut [u8], factor: f64) {
    if factor == 1.0 || !dtype.is_float() {
        return dst.copy_from_slice(src);
    }
    match dtype {
        DType::F16 => via_f32::<lanes::F16, lanes::F16>(src, dst, factor),
        DType::BF16 => via_f32::<lanes::BF16, lanes::BF16>(src, dst, factor),
        DType::F32 => via_f32::<lanes::F32, lanes::F32>(src, dst, factor),
        _ => through::<lanes::F64, lanes::F64, f64>(src, dst, factor),
    }
}

fn via_f32<S: Lane<Wide = f32>, D: Lane<Wide = f32>>(src: &[u8], dst: &mut [u8], factor: f64) {
    through::<S, D, f32>(src, dst, factor);
}

/// Between what a lane is computed in and the type in which a copy multiplies.
trait Via<N> {
    fn enter(self) -> N;
    fn leave(value: N) -> Self;
}

impl<N> Via<N> for N {
    #[inline(always)]
    fn enter(self) -> N {
        self
    }
    #[inline(always)]
    fn leave(value: N) -> N {
        value
    }
}

impl Via<f64> for f32 {
    #[inline(always)]
    fn enter(self) -> f64 {
        f64::from(self)
    }
    /// For lanes of 16 bits only.
    #[inline(always)]
    fn leave(value: f64) -> f32 {
        sixteen::narrow_f64(value)
    }
}

/// Loads, multiplies in `N`, stores.
fn through<S: Lane, D: Lane, N: Number>(src: &[u8], dst: &mut [u8], factor: f64)
where
    S::Wide: Via<N>,
    D::Wide: Via<N>,
{
    let (src, dst, factor) = (bytemuck::cast_slice(src), bytemuck::cast_slice_mut(dst), Factor::times(factor));
    if factor.is_one() {
        return dispatch(Copy::<S, D, N, _> { src, dst, finish: Keep, via: PhantomData });
    }
    match N::cheap(factor) {
        Some(finish) => dispatch(Copy::<S, D, N, _> { src, dst, finish, via: PhantomData }),
        None => dispatch(Copy::<S, D, N, _> { src, dst, finish: N::thorough(factor), via: PhantomData }),
    }
}

struct Copy<'a, S: Lane, D: Lane, N, F> {
    src: &'a [S::Bytes],
    dst: &'a mut [D::Bytes],
    finish: F,
    via: PhantomData<N>,
}

impl<S: Lane, D: Lane, N, F: Finish<N>> Kernel for Copy<'_, S, D, N, F>
where
    S::Wide: Via<N>,
    D::Wide: Via<N>,
{
    #[inline(always)]
    fn run<I: Isa>(self) {
        let (mut src, mut dst) = (self.src, self.dst);
        if let Some(f16c) = S::in_groups::<I>().or(D::in_groups::<I>()) {
            let (froms, from_rest) = src.as_chunks::<GROUP>();
            let (tos, to_rest) = dst.as_chunks_mut::<GROUP>();
            for (to, from) in tos.iter_mut().zip(froms) {
                let (from, mut values) = (S::load_group(f16c, from), [D::Wide::default(); GROUP]);
                for (value, from) in values.iter_mut().zip(from) {
                    *value = D::Wide::leave(self.finish.apply(from.enter()));
                }
                D::store_group(f16c, &values, to);
            }
            (src, dst) = (from_rest, to_rest);
        }
        for (to, from) in dst.iter_mut().zip(src) {
            *to = D::store(D::Wide::leave(self.finish.apply(S::load(*from).enter())));
        }
    }
}

struct InPlace<'a, L: Lane, F> {
    data: &'a mut [L::Bytes],
    finish: F,
}

impl<L: Lane, F: Finish<L::Wide>> Kernel for InPlace<'_, L, F> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for element in self.data {
            *element = L::store(self.finish.apply(L::load(*element)));
        }
    }
}
