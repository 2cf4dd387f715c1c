//! The element types as the kernels see them: bytes in memory, a type to compute in, and how to get from one to the
//! other. Bytes, because buffers need not be aligned.

use bytemuck::Pod;

use super::sixteen;
use crate::simd::{F16c, Isa};

/// Elements that are converted at once, where that is faster than one by one.
pub(crate) const GROUP: usize = 8;

/// An element type.
pub(crate) trait Lane: 'static {
    /// How an element lies in memory.
    type Bytes: Pod;
    /// What it is computed in: f32 for the 16-bit floats, itself for the others.
    type Wide: Number;
    /// Reads an element.
    fn load(bytes: Self::Bytes) -> Self::Wide;
    /// Rounds to an element. Of a NaN neither sign nor payload is kept: which one a sum of two has depends on how the
    /// compiler ordered the operands, so ranks would differ.
    fn store(value: Self::Wide) -> Self::Bytes;
    /// What `I` has for groups, if anything; otherwise the compiler makes the best of single elements.
    #[inline(always)]
    fn in_groups<I: Isa>() -> Option<F16c> {
        None
    }
    /// Reads a group.
    #[inline(always)]
    fn load_group(_: F16c, group: &[Self::Bytes; GROUP]) -> [Self::Wide; GROUP] {
        let mut wide = [Self::Wide::default(); GROUP];
        for (wide, bytes) in wide.iter_mut().zip(group) {
            *wide = Self::load(*bytes);
        }
        wide
    }
    /// Rounds to a group.
    #[inline(always)]
    fn store_group(_: F16c, values: &[Self::Wide; GROUP], group: &mut [Self::Bytes; GROUP]) {
        for (bytes, value) in group.iter_mut().zip(values) {
            *bytes = Self::store(*value);
        }
    }
}

/// What elements are computed in.
pub(crate) trait Number: Copy + Default + 'static {
    /// A factor that costs next to nothing to apply; its neutral value changes no bit of a number.
    type Cheap: Finish<Self>;
    /// Any factor.
    type Thorough: Finish<Self>;
    /// The sum; integers wrap.
    fn plus(self, other: Self) -> Self;
    /// The product; integers wrap.
    fn times(self, other: Self) -> Self;
    /// The lesser; the first of equals (zeros of either sign are); NaN if either is.
    fn least(self, other: Self) -> Self;
    /// The greater; the first of equals (zeros of either sign are); NaN if either is.
    fn greatest(self, other: Self) -> Self;
    /// The cheap form of a factor, where it gives the same bits as the thorough one.
    fn cheap(factor: Factor) -> Option<Self::Cheap>;
    /// The thorough form of a factor.
    fn thorough(factor: Factor) -> Self::Thorough;
}

/// The last thing that happens to a result before it is stored.
pub(crate) trait Finish<N>: Copy {
    /// Applies it.
    fn apply(self, value: N) -> N;
}

/// What results are multiplied and then divided by. Integers are only divided, and floor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Factor {
    /// Multiplied by this.
    pub multiply: f64,
    /// Divided by this whole number, at least 1.
    pub divide: f64,
}

impl Factor {
    /// Only a multiplication.
    pub(crate) fn times(multiply: f64) -> Self {
        Factor { multiply, divide: 1.0 }
    }

    /// Whether it changes nothing.
    pub(crate) fn is_one(self) -> bool {
        self.multiply == 1.0 && self.divide == 1.0
    }

    /// The division folded into the multiplication; exact where the divisor is a power of two.
    fn folded(self) -> f64 {
        self.multiply / self.divide
    }

    fn divides_exactly(self) -> bool {
        (self.divide as u64).is_power_of_two()
    }
}

/// Leaves a number as it is.
#[derive(Clone, Copy)]
pub(crate) struct Keep;

impl<N> Finish<N> for Keep {
    #[inline(always)]
    fn apply(self, value: N) -> N {
        value
    }
}

/// Multiplies in the number's own type.
#[derive(Clone, Copy)]
pub(crate) struct Times<N>(N);

impl<N: Number> Finish<N> for Times<N> {
    #[inline(always)]
    fn apply(self, value: N) -> N {
        value.times(self.0)
    }
}

/// Multiplies an f32 by a factor that is none, and rounds once.
#[derive(Clone, Copy)]
pub(crate) struct TimesWide(f64);

impl Finish<f32> for TimesWide {
    #[inline(always)]
    fn apply(self, value: f32) -> f32 {
        (f64::from(value) * self.0) as f32
    }
}

/// Multiplies and divides.
#[derive(Clone, Copy)]
pub(crate) struct TimesOver(f64, f64);

impl Finish<f64> for TimesOver {
    #[inline(always)]
    fn apply(self, value: f64) -> f64 {
        value * self.0 / self.1
    }
}

/// Divides an integer and rounds down.
#[derive(Clone, Copy)]
pub(crate) struct Floor<N>(N);

macro_rules! number {
    (float $type:ty, $thorough:ty) => {
        type Cheap = Times<$type>;
        type Thorough = $thorough;
        #[inline(always)]
        fn plus(self, other: Self) -> Self {
            self + other
        }
        #[inline(always)]
        fn times(self, other: Self) -> Self {
            self * other
        }
        #[inline(always)]
        #[allow(clippy::eq_op)] // Not equal to itself: NaN.
        fn least(self, other: Self) -> Self {
            if (other < self) | (other != other) { other } else { self }
        }
        #[inline(always)]
        #[allow(clippy::eq_op)]
        fn greatest(self, other: Self) -> Self {
            if (other > self) | (other != other) { other } else { self }
        }
    };
    (integer $($type:ty),*) => {$(
        impl Number for $type {
            type Cheap = Keep;
            type Thorough = Floor<$type>;
            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn times(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn least(self, other: Self) -> Self {
                self.min(other)
            }
            #[inline(always)]
            fn greatest(self, other: Self) -> Self {
                self.max(other)
            }
            fn cheap(factor: Factor) -> Option<Keep> {
                (factor.divide == 1.0).then_some(Keep)
            }
            fn thorough(factor: Factor) -> Floor<$type> {
                Floor(factor.divide as $type)
            }
        }

        impl Finish<$type> for Floor<$type> {
            #[inline(always)]
            fn apply(self, value: $type) -> $type {
                // The divisor is positive.
                value.div_euclid(self.0)
            }
        }
    )*};
}

number!(integer i32, i64, u8, i8, i16);

impl Number for f32 {
    number!(float f32, TimesWide);

    fn cheap(factor: Factor) -> Option<Times<f32>> {
        let folded = factor.folded();
        (f64::from(folded as f32) == folded).then_some(Times(folded as f32))
    }

    fn thorough(factor: Factor) -> TimesWide {
        TimesWide(factor.folded())
    }
}

impl Number for f64 {
    number!(float f64, TimesOver);

    fn cheap(factor: Factor) -> Option<Times<f64>> {
        factor.divides_exactly().then(|| Times(factor.folded()))
    }

    fn thorough(factor: Factor) -> TimesOver {
        TimesOver(factor.multiply, factor.divide)
    }
}

/// A bool: 0 or 1. The least of bools is and, the greatest or.
#[derive(Clone, Copy, Default)]
pub(crate) struct Truth(u8);

impl Number for Truth {
    type Cheap = Keep;
    type Thorough = Keep;
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        Truth(self.0 | other.0)
    }
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        Truth(self.0 & other.0)
    }
    #[inline(always)]
    fn least(self, other: Self) -> Self {
        Truth(self.0 & other.0)
    }
    #[inline(always)]
    fn greatest(self, other: Self) -> Self {
        Truth(self.0 | other.0)
    }
    fn cheap(_: Factor) -> Option<Keep> {
        Some(Keep)
    }
    fn thorough(_: Factor) -> Keep {
        Keep
    }
}

/// Names of the lanes; uninhabited.
pub(crate) mod lanes {
    #![allow(missing_docs)]
    pub(crate) enum F16 {}
    pub(crate) enum BF16 {}
    pub(crate) enum F32 {}
    pub(crate) enum F64 {}
    pub(crate) enum I32 {}
    pub(crate) enum I64 {}
    pub(crate) enum U8 {}
    pub(crate) enum I8 {}
    pub(crate) enum I16 {}
    pub(crate) enum Bool {}
}

/// How a lane of binary16 converts groups.
macro_rules! groups {
    () => {
        #[inline(always)]
        fn in_groups<I: Isa>() -> Option<F16c> {
            I::F16C
        }
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn load_group(_: F16c, group: &[[u8; 2]; GROUP]) -> [f32; GROUP] {
            // SAFETY: the caller has proof that the CPU has F16C.
            unsafe { sixteen::widen_f16_group(group) }
        }
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn store_group(_: F16c, values: &[f32; GROUP], group: &mut [[u8; 2]; GROUP]) {
            // SAFETY: as above.
            unsafe { sixteen::narrow_f16_group(values, group) };
        }
    };
}

// Expressions rather than closures: a closure cannot be marked to be inlined always, and where it is not, the loop
// around it stays scalar.
macro_rules! lane {
    ($lane:ident: $bytes:ty => $wide:ty, $from:ident => $load:expr, $value:ident => $store:expr $(, $groups:ident)?) => {
        impl Lane for lanes::$lane {
            $($groups!();)?
            type Bytes = $bytes;
            type Wide = $wide;
            #[inline(always)]
            fn load($from: $bytes) -> $wide {
                $load
            }
            #[inline(always)]
            fn store($value: $wide) -> $bytes {
                $store
            }
        }
    };
    ($($lane:ident: $bytes:ty => $wide:ty),*) => {
        $(lane!($lane: $bytes => $wide, b => <$wide>::from_ne_bytes(b), v => v.to_ne_bytes());)*
    };
}

lane!(F16: [u8; 2] => f32,
    b => sixteen::widen_f16(u16::from_ne_bytes(b)), v => sixteen::narrow_f16(v).to_ne_bytes(), groups);
lane!(BF16: [u8; 2] => f32,
    b => sixteen::widen_bf16(u16::from_ne_bytes(b)), v => sixteen::narrow_bf16(v).to_ne_bytes());
lane!(F32: [u8; 4] => f32,
    b => f32::from_ne_bytes(b), v => if v.is_nan() { f32::NAN } else { v }.to_ne_bytes());
lane!(F64: [u8; 8] => f64,
    b => f64::from_ne_bytes(b), v => if v.is_nan() { f64::NAN } else { v }.to_ne_bytes());
lane!(I32: [u8; 4] => i32, I64: [u8; 8] => i64, U8: [u8; 1] => u8, I8: [u8; 1] => i8, I16: [u8; 2] => i16);
lane!(Bool: [u8; 1] => Truth, b => Truth(u8::from(b[0] != 0)), v => [v.0]);

/// Runs code with a lane type chosen by a [`crate::DType`].
macro_rules! with_lane {
    ($dtype:expr, $lane:ident => $body:expr) => {{
        use crate::wire::lane::lanes;
        macro_rules! arm {
            ($name:ident) => {{
                type $lane = lanes::$name;
                $body
            }};
        }
        match $dtype {
            crate::DType::F16 => arm!(F16),
            crate::DType::BF16 => arm!(BF16),
            crate::DType::F32 => arm!(F32),
            crate::DType::F64 => arm!(F64),
            crate::DType::I32 => arm!(I32),
            crate::DType::I64 => arm!(I64),
            crate::DType::U8 => arm!(U8),
            crate::DType::I8 => arm!(I8),
            crate::DType::I16 => arm!(I16),
            crate::DType::Bool => arm!(Bool),
        }
    }};
}
pub(crate) use with_lane;
