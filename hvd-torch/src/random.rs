//! Seeds and determinism.

use crate::error::Result;
use crate::shim;

/// Seeds torch's random generators, on all devices.
pub fn manual_seed(seed: u64) {
    tch::manual_seed(seed as i64);
}

/// Seeds torch's random generators from several numbers, such as a seed, a step, a micro-step and a rank.
///
/// tch cannot save the state of a generator. A run that reseeds at the start of every micro-step can be resumed exactly
/// all the same.
pub fn reseed(parts: &[u64]) {
    manual_seed(mix(parts));
}

/// Several numbers hashed to one; each bit of the result depends on all of them and on their order.
pub fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x243f_6a88_85a3_08d3, |state, part| splitmix(state ^ splitmix(*part)))
}

/// One step of SplitMix64 (Steele, Lea and Flood, 2014).
fn splitmix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What torch does about operations that have no deterministic implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Determinism {
    /// Runs them.
    Off,
    /// Runs them with a warning.
    Warn,
    /// Refuses them with an error.
    Enforce,
}

/// Chooses deterministic implementations where torch has several; see [`Determinism`] for where it has none.
///
/// On CPU, results also depend on [`crate::set_num_threads`]; on CUDA, cuBLAS wants `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the
/// environment.
pub fn set_deterministic(determinism: Determinism) -> Result<()> {
    shim::set_deterministic(determinism != Determinism::Off, determinism == Determinism::Warn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn mixing_tells_parts_apart() {
        let all = [mix(&[]), mix(&[0]), mix(&[0, 0]), mix(&[1, 0]), mix(&[0, 1]), mix(&[2, 3]), mix(&[3, 2])];
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let draw = |parts: &[u64]| {
            reseed(parts);
            Vec::<f32>::try_from(Tensor::rand([8], (Kind::Float, Device::Cpu))).unwrap()
        };
        // Other tests draw from the same generator on other threads: try until nobody came between.
        assert!((0..100).any(|_| draw(&[1, 2]) == draw(&[1, 2])));
        assert_ne!(draw(&[1, 2]), draw(&[2, 1]));
    }

    #[test]
    fn determinism_can_be_set_and_unset() {
        set_deterministic(Determinism::Warn).unwrap();
        set_deterministic(Determinism::Off).unwrap();
    }
}
