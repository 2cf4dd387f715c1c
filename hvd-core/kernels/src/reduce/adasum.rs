//! The vector arithmetic of Adasum: inner products, and the sum of two scaled vectors.

use std::marker::PhantomData;

use crate::dtype::DType;
use crate::simd::{Isa, Kernel, dispatch};
use crate::wire::lane::{Lane, lanes};
use crate::wire::sixteen;

/// Partial sums of an inner product. A fixed number, so that the bits do not depend on the CPU's vectors.
const SUMS: usize = 16;

/// A float that is read as f64, and rounded from it once.
trait Real: Lane {
    fn read(bytes: Self::Bytes) -> f64;
    fn write(value: f64) -> Self::Bytes;
}

macro_rules! real {
    ($($lane:ident, $value:ident => $narrow:expr);*) => {$(
        impl Real for lanes::$lane {
            #[inline(always)]
            #[allow(clippy::useless_conversion)] // For f64.
            fn read(bytes: Self::Bytes) -> f64 {
                f64::from(Self::load(bytes))
            }
            #[inline(always)]
            fn write($value: f64) -> Self::Bytes {
                Self::store($narrow)
            }
        }
    )*};
}

real!(
    F16, value => sixteen::narrow_f64(value);
    BF16, value => sixteen::narrow_f64(value);
    F32, value => value as f32;
    F64, value => value
);

macro_rules! with_real {
    ($dtype:expr, $lane:ident => $body:expr) => {{
        macro_rules! arm {
            ($name:ident) => {{
                type $lane = lanes::$name;
                $body
            }};
        }
        match $dtype {
            DType::F16 => arm!(F16),
            DType::BF16 => arm!(BF16),
            DType::F32 => arm!(F32),
            DType::F64 => arm!(F64),
            other => panic!("Adasum of {other} is not defined"),
        }
    }};
}

/// What Adasum needs to know of two vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Products {
    /// The inner product of the first and the second.
    pub cross: f64,
    /// The inner product of the first with itself.
    pub first: f64,
    /// The inner product of the second with itself.
    pub second: f64,
}

impl Products {
    /// Of two vectors of floats.
    ///
    /// # Panics
    /// If the lengths differ, end in a part of an element, or the type is no float.
    pub fn of(dtype: DType, first: &[u8], second: &[u8]) -> Self {
        assert_eq!(first.len(), second.len(), "lengths of the vectors");
        let mut products = Products::default();
        with_real!(dtype, L => {
            let (first, second) = (bytemuck::cast_slice(first), bytemuck::cast_slice(second));
            dispatch(Multiply::<L> { first, second, products: &mut products });
        });
        products
    }

    /// Of two vectors that are split into parts.
    pub fn plus(self, other: Self) -> Self {
        Products {
            cross: self.cross + other.cross,
            first: self.first + other.first,
            second: self.second + other.second,
        }
    }

    /// What Adasum multiplies the first and the second vector by: `1 - a·b / 2|a|²` and `1 - a·b / 2|b|²`. Orthogonal
    /// vectors are added, equal ones averaged; a vector of zeros changes nothing.
    pub fn factors(self) -> (f64, f64) {
        let factor = |square: f64| if square == 0.0 { 1.0 } else { 1.0 - self.cross / square * 0.5 };
        (factor(self.first), factor(self.second))
    }
}

/// `into = into · factors.0 + from · factors.1`, in f64 and rounded once.
///
/// # Panics
/// As [`Products::of`].
pub fn blend(dtype: DType, into: &mut [u8], from: &[u8], factors: (f64, f64)) {
    assert_eq!(into.len(), from.len(), "lengths of the vectors");
    with_real!(dtype, L => {
        let (into, from) = (bytemuck::cast_slice_mut(into), bytemuck::cast_slice(from));
        dispatch(Blend::<L> { into, from, factors, lane: PhantomData });
    })
}

struct Multiply<'a, L: Lane> {
    first: &'a [L::Bytes],
    second: &'a [L::Bytes],
    products: &'a mut Products,
}

impl<L: Real> Kernel for Multiply<'_, L> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut sums = [[0.0f64; SUMS]; 3];
        for (first, second) in self.first.chunks(SUMS).zip(self.second.chunks(SUMS)) {
            for (at, (first, second)) in first.iter().zip(second).enumerate() {
                let (a, b) = (L::read(*first), L::read(*second));
                sums[0][at] += a * b;
                sums[1][at] += a * a;
                sums[2][at] += b * b;
            }
        }
        let [cross, first, second] = sums.map(|sums| sums.iter().sum());
        *self.products = Products { cross, first, second };
    }
}

struct Blend<'a, L: Lane> {
    into: &'a mut [L::Bytes],
    from: &'a [L::Bytes],
    factors: (f64, f64),
    lane: PhantomData<L>,
}

impl<L: Real> Kernel for Blend<'_, L> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let (own, other) = self.factors;
        for (into, from) in self.into.iter_mut().zip(self.from) {
            *into = L::write(L::read(*into) * own + L::read(*from) * other);
        }
    }
}
