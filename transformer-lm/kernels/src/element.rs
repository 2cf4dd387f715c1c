//! What tensors hold.

use half::bf16;
use hvd_kernels::simd::{Isa, Kernel, dispatch};
use hvd_kernels::wire::{narrow_bf16, widen_bf16};

/// An element of a tensor, which is computed with in f32.
pub trait Element: Copy + Send + Sync + 'static {
    /// Its value.
    fn widen(self) -> f32;
    /// The nearest to a value, the even one of two.
    fn narrow(value: f32) -> Self;
    /// The nearest bf16.
    fn round(self) -> bf16;
    /// [`Element::narrow`] of each value. A subnormal number may become zero, and a NaN another one.
    fn narrow_all<I: Isa>(values: &[f32], out: &mut [Self]);
    /// The same, past the caches where the CPU can do that.
    ///
    /// # Safety
    /// The thread calls [`finish_streams`](super::finish_streams) before anybody, itself included, uses these elements again.
    unsafe fn stream_all<I: Isa>(values: &[f32], out: &mut [Self]);
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn round(self) -> bf16 {
        bf16::narrow(self)
    }

    #[inline(always)]
    fn narrow_all<I: Isa>(values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(values);
    }

    #[inline(always)]
    unsafe fn stream_all<I: Isa>(values: &[f32], out: &mut [f32]) {
        assert_eq!(values.len(), out.len());
        #[cfg(target_arch = "x86_64")]
        if I::AVX512.is_some() && vectors::is_aligned(out) {
            // SAFETY: the code in hand is compiled for these instructions; the rest is the caller's promise.
            return unsafe { vectors::stream(values, out) };
        }
        Self::narrow_all::<I>(values, out);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_bf16(self.to_bits())
    }

    #[inline(always)]
    fn narrow(value: f32) -> bf16 {
        bf16::from_bits(narrow_bf16(value))
    }

    #[inline(always)]
    fn round(self) -> bf16 {
        self
    }

    #[inline(always)]
    fn narrow_all<I: Isa>(values: &[f32], out: &mut [bf16]) {
        assert_eq!(values.len(), out.len());
        #[cfg(target_arch = "x86_64")]
        if I::BF16.is_some() {
            // SAFETY: the code in hand is compiled for these instructions.
            return unsafe { vectors::narrow::<false>(values, out) };
        }
        for (out, value) in out.iter_mut().zip(values) {
            *out = bf16::narrow(*value);
        }
    }

    #[inline(always)]
    unsafe fn stream_all<I: Isa>(values: &[f32], out: &mut [bf16]) {
        assert_eq!(values.len(), out.len());
        #[cfg(target_arch = "x86_64")]
        if I::BF16.is_some() && vectors::is_aligned(out) {
            // SAFETY: as above; the rest is the caller's promise.
            return unsafe { vectors::narrow::<true>(values, out) };
        }
        Self::narrow_all::<I>(values, out);
    }
}

/// Vectors of 512 bits.
#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    use half::bf16;

    /// Bytes of a vector, and of a line of the cache.
    const BYTES: usize = 64;
    const FLOATS: usize = BYTES / size_of::<f32>();
    const HALVES: usize = BYTES / size_of::<bf16>();

    /// Whether it can be streamed to: from the first element on, vector by vector.
    #[inline(always)]
    pub(super) fn is_aligned<T>(out: &[T]) -> bool {
        out.as_ptr().addr().is_multiple_of(BYTES)
    }

    /// Copies past the caches, but for what is left of the last vector.
    ///
    /// # Safety
    /// The CPU must have AVX-512 F, the place [is aligned](is_aligned), and there are as many values. As for
    /// [`stream_all`](super::Element::stream_all).
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn stream(values: &[f32], out: &mut [f32]) {
        let ((values, values_left), (out, out_left)) = (values.as_chunks::<FLOATS>(), out.as_chunks_mut::<FLOATS>());
        for (out, values) in out.iter_mut().zip(values) {
            // SAFETY: a vector is as many elements, and aligned, as the first one is.
            unsafe { _mm512_stream_ps(out.as_mut_ptr(), _mm512_loadu_ps(values.as_ptr())) };
        }
        out_left.copy_from_slice(values_left);
    }

    /// Rounds values; those of whole vectors past the caches, where it streams.
    ///
    /// # Safety
    /// The CPU must have AVX-512 F and BF16, and there are as many values. Where it streams, the place [is aligned](is_aligned), and as for
    /// [`stream_all`](super::Element::stream_all).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn narrow<const STREAMS: bool>(values: &[f32], out: &mut [bf16]) {
        let ((values, values_left), (out, out_left)) = (values.as_chunks::<HALVES>(), out.as_chunks_mut::<HALVES>());
        for (out, values) in out.iter_mut().zip(values) {
            let (to, vector) = (out.as_mut_ptr().cast(), rounded(values));
            // SAFETY: a vector is as many elements, and aligned, as the first one is, where it streams.
            unsafe { if STREAMS { _mm512_stream_si512(to, vector) } else { _mm512_storeu_si512(to, vector) } }
        }
        if !values_left.is_empty() {
            // By the same instruction, so that it does not matter where in a row a value stands.
            let (mut padded, mut rest) = ([0.0; HALVES], [bf16::ZERO; HALVES]);
            padded[..values_left.len()].copy_from_slice(values_left);
            // SAFETY: a vector is as many elements.
            unsafe { _mm512_storeu_si512(rest.as_mut_ptr().cast(), rounded(&padded)) };
            out_left.copy_from_slice(&rest[..values_left.len()]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn rounded(values: &[f32; HALVES]) -> __m512i {
        let (low, high) = values.split_at(FLOATS);
        // SAFETY: two vectors of f32 are as many elements as one of bf16; any 512 bits are a vector.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr()));
            std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
        }
    }
}

/// Each element in the other type.
///
/// # Panics
/// If there are not as many.
pub fn convert<A: Element, B: Element>(from: &[A], to: &mut [B]) {
    assert_eq!(from.len(), to.len());
    dispatch(Convert { from, to });
}

/// Elements that are computed in f32 before they are rounded.
const PIECE: usize = 64;

struct Convert<'a, A, B> {
    from: &'a [A],
    to: &'a mut [B],
}

impl<A: Element, B: Element> Kernel for Convert<'_, A, B> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut values = [0.0; PIECE];
        for (to, from) in self.to.chunks_mut(PIECE).zip(self.from.chunks(PIECE)) {
            let values = &mut values[..from.len()];
            for (value, from) in values.iter_mut().zip(from) {
                *value = from.widen();
            }
            B::narrow_all::<I>(values, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use hvd_kernels::simd::{Level, dispatch_at};

    use super::super::Lines;
    use super::super::tests::numbers;
    use super::*;

    /// Writes to a place, both ways.
    struct Write<'a, E> {
        values: &'a [f32],
        plain: &'a mut [E],
        streamed: &'a mut [E],
    }

    impl<E: Element> Kernel for Write<'_, E> {
        fn run<I: Isa>(self) {
            E::narrow_all::<I>(self.values, self.plain);
            // SAFETY: what waits for the stream is the next statement.
            unsafe { E::stream_all::<I>(self.values, self.streamed) };
            crate::finish_streams();
        }
    }

    fn check<E: Element + bytemuck::Pod + PartialEq + std::fmt::Debug>() {
        for level in Level::available() {
            for (start, len) in [(0, 0), (0, 15), (0, 16), (3, 16), (0, 31), (0, 32), (32, 70), (1, 70), (0, 128)] {
                let values = &numbers(len)[..];
                let [mut plain, mut streamed] = [(); 2].map(|()| Lines::<E>::any(start + len + 5));
                [&mut plain, &mut streamed].into_iter().for_each(|lines| lines.fill(E::zeroed()));
                let place = start..start + len;
                let (to, beside) = (&mut plain[place.clone()], &mut streamed[place]);
                dispatch_at(level, Write { values, plain: to, streamed: beside });
                let expected: Vec<E> = values.iter().map(|value| E::narrow(*value)).collect();
                assert_eq!(plain[start..start + len], expected[..], "{level:?}");
                assert_eq!(plain[..], streamed[..], "{level:?} {start} {len}");
                assert!(plain[..start].iter().chain(&plain[start + len..]).all(|other| *other == E::zeroed()));
            }
        }
    }

    #[test]
    fn what_is_streamed_is_what_is_written() {
        check::<f32>();
        check::<bf16>();
    }

    #[test]
    fn every_level_rounds_the_same_numbers_the_same_way() {
        let ties = [0x3f80_8000u32, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0xbf81_8000].map(f32::from_bits);
        let limits = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE];
        let values = [&ties[..], &limits].concat();
        for level in Level::available() {
            let mut out = vec![bf16::ZERO; values.len()];
            dispatch_at(level, Convert { from: &values[..], to: &mut out[..] });
            for (out, value) in out.iter().zip(&values) {
                assert_eq!(out.to_bits(), bf16::from_f32(*value).to_bits(), "{value} {level:?}");
            }
            let mut rest = [bf16::ONE; 2];
            dispatch_at(level, Convert { from: &[f32::NAN, 1e-39], to: &mut rest });
            assert!(rest[0].is_nan() && rest[1].to_f32().abs() <= 1.1e-39, "{rest:?} {level:?}");
        }
    }
}
