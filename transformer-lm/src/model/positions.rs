//! Positions that are not learned.

use tch::{Device, Kind, Tensor};

/// The longest wavelength is this many times 2π.
const LONGEST: f64 = 10_000.0;

/// (len, width): at position `t` column `2i` is `sin(t / 10000^(2i/width))`, column `2i + 1` the cosine of the same. Computed in
/// f64, then rounded.
pub(super) fn sinusoidal(len: usize, width: usize, kind: Kind, device: Device) -> Tensor {
    let element = |t: usize, column: usize| {
        let angle = t as f64 / LONGEST.powf((column - column % 2) as f64 / width as f64);
        if column.is_multiple_of(2) { angle.sin() } else { angle.cos() }
    };
    let table: Vec<f64> = (0..len * width).map(|i| element(i / width, i % width)).collect();
    Tensor::from_slice(&table).view([len as i64, width as i64]).to_kind(kind).to_device(device)
}
