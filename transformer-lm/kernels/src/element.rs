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
}

/// Each element in the other type.
///
/// # Panics
/// If there are not as many.
pub fn convert<A: Element, B: Element>(from: &[A], to: &mut [B]) {
    assert_eq!(from.len(), to.len());
    dispatch(Convert { from, to });
}

struct Convert<'a, A, B> {
    from: &'a [A],
    to: &'a mut [B],
}

impl<A: Element, B: Element> Kernel for Convert<'_, A, B> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to = B::narrow(from.widen());
        }
    }
}
