//! The exponential function, in operations that a compiler can put into vectors.

/// e to the power of `x`, within 2 units in the last place (Cephes' `expf`). Arguments are clamped to where the result is a normal
/// number, [-87, 88]; of NaN it is NaN.
#[inline(always)]
#[allow(clippy::excessive_precision, clippy::manual_clamp)] // Cephes' digits; `clamp` would not become vectors
pub(super) fn exp(x: f32) -> f32 {
    /// Added and taken away again it leaves the nearest whole number, which then also stands in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23
    const POLYNOMIAL: [f32; 5] =
        [1.398_199_950_7e-3, 8.333_451_907_3e-3, 4.166_579_589_4e-2, 1.666_666_545_9e-1, 5.000_000_120_1e-1];
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_40e-4, n.mul_add(-0.693_359_375, x)); // x − n · ln 2
    let p = POLYNOMIAL.into_iter().fold(1.987_569_15e-4f32, |p, coefficient| p.mul_add(r, coefficient));
    let y = p.mul_add(r * r, r) + 1.0;
    f32::from_bits(y.to_bits().wrapping_add(shifted.to_bits() << 23))
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn it_is_close_to_the_exact_value_everywhere() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "{x}: {error}");
            x += 0.000_37 + x.abs() * 1e-5;
        }
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn beyond_its_range_it_stays_a_positive_number() {
        for x in [-88.0, -1e30, f32::NEG_INFINITY] {
            assert!(exp(x) > 0.0 && exp(x) < 2e-38);
        }
        for x in [89.0, 1e30, f32::INFINITY] {
            assert!(exp(x) > 1e38 && exp(x).is_finite());
        }
        assert!(exp(f32::NAN).is_nan());
    }
}
