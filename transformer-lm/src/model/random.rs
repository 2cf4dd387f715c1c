//! Random numbers of our own: the same on every device, element type, libtorch version and number of threads, and
//! apart from libtorch's global generator. Those of dropout are [`Dropout`](super::Dropout)'s.

/// A small fast generator (xoshiro256++), seeded through SplitMix64.
#[derive(Clone, Debug)]
pub struct Generator {
    state: [u64; 4],
}

impl Generator {
    /// The generator of `seed` for one use of it; streams of different numbers are independent.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mix = seed;
        let mut mix = split_mix(&mut mix) ^ stream;
        Self { state: std::array::from_fn(|_| split_mix(&mut mix)) }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in `[0, 1)`, a multiple of 2⁻⁵³.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Two independent draws from N(0, 1) (Box and Muller).
    pub fn normal_pair(&mut self) -> (f64, f64) {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        (radius * cos, radius * sin)
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A stream number made from a name (FNV-1a).
pub fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3))
}

/// Elements that share a generator in [`normal`], so that threads can draw side by side.
const CHUNK: usize = 1 << 16;

/// `len` draws from N(0, std²) that depend on `seed` and `name` alone.
pub fn normal(seed: u64, name: &str, len: usize, std: f64) -> Vec<f32> {
    let mut values = vec![0f32; len];
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(len.div_ceil(CHUNK)).max(1);
    let per_thread = len.div_ceil(CHUNK).div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (thread, part) in values.chunks_mut(per_thread * CHUNK).enumerate() {
            scope.spawn(move || {
                for (index, chunk) in part.chunks_mut(CHUNK).enumerate() {
                    let stream = stream_of(name).wrapping_add((thread * per_thread + index) as u64);
                    fill_normal(&mut Generator::new(seed, stream), chunk, std);
                }
            });
        }
    });
    values
}

fn fill_normal(generator: &mut Generator, values: &mut [f32], std: f64) {
    for pair in values.chunks_mut(2) {
        let (first, second) = generator.normal_pair();
        pair[0] = (first * std) as f32;
        if let Some(value) = pair.get_mut(1) {
            *value = (second * std) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_the_moments_asked_for() {
        let values = normal(1, "w", 3 * CHUNK + 7, 0.02);
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 2e-4, "{mean}");
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.01, "{variance}");
    }

    #[test]
    fn normal_depends_on_seed_and_name_and_on_nothing_else() {
        assert_eq!(normal(1, "w", 1000, 1.0), normal(1, "w", 1000, 1.0));
        assert_eq!(normal(1, "w", 1000, 1.0), normal(1, "w", 5000, 1.0)[..1000]);
        assert_ne!(normal(1, "w", 1000, 1.0), normal(2, "w", 1000, 1.0));
        assert_ne!(normal(1, "w", 1000, 1.0), normal(1, "v", 1000, 1.0));
    }
}
