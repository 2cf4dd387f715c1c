//! Conversions between 16-bit floats and wider ones, without branches so that loops over them become vector code.
//!
//! To the nearest, ties to even; overflow gives infinity; a NaN becomes the positive quiet one. No step reads or makes a
//! subnormal f32 that matters to binary16, so a flush-to-zero mode changes nothing there. The CPU's own instructions for
//! groups of eight give the same bits.

/// One of two numbers, never by a branch: where an `if` becomes one, the loop around it stays scalar.
#[inline(always)]
fn select(condition: bool, yes: u32, no: u32) -> u32 {
    let mask = u32::from(condition).wrapping_neg();
    (yes & mask) | (no & !mask)
}

/// The f32 of a binary16.
#[inline(always)]
pub(crate) fn widen_f16(half: u16) -> f32 {
    const EXPONENT: u32 = 0x7c00 << 13;
    let sign = u32::from(half & 0x8000) << 16;
    let shifted = u32::from(half & 0x7fff) << 13;
    let exponent = shifted & EXPONENT;
    let rebased = shifted + ((127 - 15) << 23);
    // A subnormal is its bits as the fraction of 2^-14, less that 2^-14.
    let subnormal = (f32::from_bits(rebased + (1 << 23)) - f32::from_bits(113 << 23)).to_bits();
    let special = rebased + ((128 - 16) << 23);
    let normal_or_special = select(exponent == EXPONENT, special, rebased);
    f32::from_bits(sign | select(exponent == 0, subnormal, normal_or_special))
}

/// The binary16 nearest to an f32.
#[inline(always)]
pub(crate) fn narrow_f16(value: f32) -> u16 {
    const INFINITY: u32 = 255 << 23;
    /// The first power of two that is too large.
    const OVERFLOW: u32 = (127 + 16) << 23;
    /// The least normal binary16.
    const NORMAL: u32 = 113 << 23;
    /// Added to a small number, it leaves the number's multiple of 2^-24 in the last bits, rounded by the addition.
    const ALIGN: u32 = ((127 - 15) + (23 - 10) + 1) << 23;
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
    let subnormal = (f32::from_bits(magnitude) + f32::from_bits(ALIGN)).to_bits().wrapping_sub(ALIGN);
    let finite = select(magnitude < NORMAL, subnormal, normal);
    let number = sign | select(magnitude >= OVERFLOW, 0x7c00, finite);
    select(magnitude > INFINITY, 0x7e00, number) as u16
}

/// The f32 of a bfloat16.
#[inline(always)]
pub fn widen_bf16(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

/// The bfloat16 nearest to an f32.
#[inline(always)]
pub fn narrow_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let odd = (bits >> 16) & 1;
    let rounded = bits.wrapping_add(0x7fff + odd) >> 16;
    select(bits & 0x7fff_ffff > 0x7f80_0000, 0x7fc0, rounded) as u16
}

/// An f32 that rounds to 16 bits as `value` itself would: rounded to odd, so that what was cut off still breaks ties.
#[inline(always)]
pub(crate) fn narrow_f64(value: f64) -> f32 {
    let nearest = value as f32;
    let bits = nearest.to_bits();
    let back = f64::from(nearest).abs();
    let exact = (back == value.abs()) | value.is_nan();
    let toward = select(back > value.abs(), bits.wrapping_sub(1), bits.wrapping_add(1));
    f32::from_bits(select(exact | (bits & 1 == 1), bits, toward))
}

/// As [`widen_f16`], eight at once.
///
/// # Safety
/// The CPU must have F16C.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx,f16c")]
pub(crate) unsafe fn widen_f16_group(group: &[[u8; 2]; 8]) -> [f32; 8] {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let mut wide = [0.0; 8];
    // SAFETY: both are 8 elements, of 16 and of 32 bits.
    unsafe { _mm256_storeu_ps(wide.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(group.as_ptr().cast()))) };
    wide
}

/// As [`narrow_f16`], eight at once.
///
/// # Safety
/// The CPU must have F16C.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx,f16c")]
pub(crate) unsafe fn narrow_f16_group(values: &[f32; 8], group: &mut [[u8; 2]; 8]) {
    use std::arch::x86_64::*;
    // SAFETY: both are 8 elements, of 32 and of 16 bits.
    unsafe {
        let wide = _mm256_loadu_ps(values.as_ptr());
        // The one NaN, as the instruction would keep sign and payload.
        let ordered = _mm256_cmp_ps::<_CMP_ORD_Q>(wide, wide);
        let wide = _mm256_blendv_ps(_mm256_set1_ps(f32::NAN), wide, ordered);
        _mm_storeu_si128(group.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide));
    }
}
