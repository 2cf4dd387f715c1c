//! How fast training could be, and how fast it is.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::model::ModelConfig;

/// Products that are timed; the fastest counts.
const TRIES: usize = 3;

/// Floating-point operations that training does for a token, forward and backward: 6 for each parameter that is multiplied
/// with, and 12 · layers · width · context for attention (Chowdhery et al., 2022, appendix B). What checkpointing computes a
/// second time does not count.
pub fn flops_per_token(shape: &ModelConfig) -> f64 {
    let multiplied = shape.parameter_count() - shape.position_parameter_count(); // positions are added, not multiplied
    let attention = 12 * shape.n_layers * shape.d_model * shape.max_seq_len;
    (6 * multiplied + attention) as f64
}

/// Floating-point operations per second that this rank reaches in a large product of `kind`, now, beside the other ranks.
pub fn measure_peak_flops(device: Device, kind: Kind) -> f64 {
    let n: i64 = if device.is_cuda() { 8192 } else { 1024 };
    let a = Tensor::ones([n, n], (kind, device));
    let run = || {
        let started = Instant::now();
        a.matmul(&a).double_value(&[0, 0]); // reading it waits for the device
        started.elapsed().as_secs_f64()
    };
    run(); // starts threads and loads kernels
    let fastest = (0..TRIES).map(|_| run()).fold(f64::INFINITY, f64::min);
    2.0 * (n as f64).powi(3) / fastest
}

/// What an update took, summed since the last row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    pub tokens: f64,
    pub seconds: f64,
    pub waited: f64,
    pub updates: f64,
}

impl Pace {
    pub(super) fn add(&mut self, tokens: f64, seconds: f64, waited: f64) {
        self.tokens += tokens;
        self.seconds += seconds;
        self.waited += waited;
        self.updates += 1.0;
    }

    pub(super) fn tokens_per_s(&self) -> f64 {
        self.tokens / self.seconds
    }

    pub(super) fn step_ms(&self) -> f64 {
        1e3 * self.seconds / self.updates
    }

    /// Share of the time that went by waiting.
    pub(super) fn waiting(&self) -> f64 {
        self.waited / self.seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpt2_takes_the_known_number_of_operations() {
        let shape = ModelConfig { max_seq_len: 1024, ..ModelConfig::default() };
        // nanoGPT's estimate for this shape: 6 · 123.65e6 + 12 · 12 · 12 · 64 · 1024.
        assert!((flops_per_token(&shape) / 8.551e8 - 1.0).abs() < 1e-3);
    }

    #[test]
    fn a_peak_is_a_positive_number() {
        let peak = measure_peak_flops(Device::Cpu, Kind::Float);
        assert!(peak.is_finite() && peak > 1e8, "{peak}");
    }
}
