//! Elements of any type as the tests see them: random ones, and their values as f64 or i128.
#![allow(dead_code)] // Each test binary uses a part.

pub mod adasum;

use half::{bf16, f16};
use hvd_core::{DType, ReduceOp};

pub const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product];

/// Every pair of an operation and a type for which it is defined.
pub fn supported() -> Vec<(ReduceOp, DType)> {
    OPS.iter()
        .flat_map(|op| DType::ALL.iter().map(|dtype| (*op, *dtype)))
        .filter(|(op, dtype)| op.supports(*dtype))
        .collect()
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From `low` up to `high`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A float with a size that suits the operation, or any integer; for an integer Average one whose sums do not wrap.
pub fn random_element(random: &mut Random, op: ReduceOp, dtype: DType) -> Vec<u8> {
    let sign = if random.next() & 1 == 0 { 1.0 } else { -1.0 };
    let float = match op {
        ReduceOp::Product => sign * random.uniform(0.75, 1.33),
        _ => sign * random.uniform(0.0, 8.0),
    };
    let bits = random.next();
    let integer = if op == ReduceOp::Average { (bits as i64) >> 40 } else { bits as i64 };
    match dtype {
        DType::F16 => f16::from_f64(float).to_ne_bytes().to_vec(),
        DType::BF16 => bf16::from_f64(float).to_ne_bytes().to_vec(),
        DType::F32 => (float as f32).to_ne_bytes().to_vec(),
        DType::F64 => float.to_ne_bytes().to_vec(),
        DType::I32 => (integer as i32).to_ne_bytes().to_vec(),
        DType::I64 => integer.to_ne_bytes().to_vec(),
        DType::I16 => (integer as i16).to_ne_bytes().to_vec(),
        DType::U8 | DType::I8 => vec![integer as u8],
        DType::Bool => vec![(integer & 1) as u8],
    }
}

pub fn random_elements(seed: u64, op: ReduceOp, dtype: DType, count: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..count).flat_map(|_| random_element(&mut random, op, dtype)).collect()
}

/// The values of a buffer of floats.
pub fn floats(dtype: DType, data: &[u8]) -> Vec<f64> {
    data.chunks(dtype.size())
        .map(|bytes| match dtype {
            DType::F16 => f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
            DType::BF16 => bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64(),
            DType::F32 => f64::from(f32::from_ne_bytes(bytes.try_into().unwrap())),
            DType::F64 => f64::from_ne_bytes(bytes.try_into().unwrap()),
            _ => panic!("{dtype} is no float"),
        })
        .collect()
}

/// The values of a buffer of integers or bools.
pub fn integers(dtype: DType, data: &[u8]) -> Vec<i128> {
    data.chunks(dtype.size())
        .map(|bytes| match dtype {
            DType::I32 => i32::from_ne_bytes(bytes.try_into().unwrap()).into(),
            DType::I64 => i64::from_ne_bytes(bytes.try_into().unwrap()).into(),
            DType::I16 => i16::from_ne_bytes(bytes.try_into().unwrap()).into(),
            DType::I8 => (bytes[0] as i8).into(),
            DType::U8 | DType::Bool => bytes[0].into(),
            _ => panic!("{dtype} is no integer"),
        })
        .collect()
}

/// An integer as the type holds it after wrapping.
pub fn wrapped(dtype: DType, value: i128) -> i128 {
    match dtype {
        DType::I32 => (value as i32).into(),
        DType::I64 => (value as i64).into(),
        DType::I16 => (value as i16).into(),
        DType::I8 => (value as i8).into(),
        DType::U8 => (value as u8).into(),
        _ => value,
    }
}

/// Half the distance from 1 to the next number: the relative error of one rounding.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        DType::F32 => 2f64.powi(-24),
        _ => 2f64.powi(-53),
    }
}

/// What an element should be, and how far from it a float may be.
#[derive(Debug)]
pub enum Expected {
    Exactly(i128),
    About(f64, f64),
}

/// The reduction of the ranks' buffers, element by element.
pub fn reference(op: ReduceOp, dtype: DType, inputs: &[Vec<u8>], scale: f64) -> Vec<Expected> {
    if dtype.is_float() {
        let columns: Vec<_> = inputs.iter().map(|input| floats(dtype, input)).collect();
        (0..columns[0].len()).map(|at| float(op, dtype, columns.iter().map(|column| column[at]), scale)).collect()
    } else {
        let columns: Vec<_> = inputs.iter().map(|input| integers(dtype, input)).collect();
        (0..columns[0].len()).map(|at| integer(op, dtype, columns.iter().map(|column| column[at]))).collect()
    }
}

/// Each of the n - 1 operations and of two final ones (Average, scale) is off by at most the unit roundoff of its
/// result, which for sums is at most the sum of the magnitudes, and for products the product itself. Minimum and
/// maximum are exact. The f64 reference rounds as often itself, hence twice that for f64; one percent more covers the
/// products of roundoffs.
fn float(op: ReduceOp, dtype: DType, values: impl ExactSizeIterator<Item = f64> + Clone, scale: f64) -> Expected {
    let count = values.len() as f64;
    let sum: f64 = values.clone().sum();
    let magnitude: f64 = values.clone().map(f64::abs).sum();
    let product: f64 = values.clone().product();
    let (value, magnitude, roundings) = match op {
        ReduceOp::Sum => (sum, magnitude, count + 1.0),
        ReduceOp::Average => (sum / count, magnitude / count, count + 1.0),
        ReduceOp::Product => (product, product.abs(), count + 1.0),
        ReduceOp::Min => (values.fold(f64::INFINITY, f64::min), 0.0, 0.0),
        ReduceOp::Max => (values.fold(f64::NEG_INFINITY, f64::max), 0.0, 0.0),
        ReduceOp::Adasum => unreachable!("not element by element"),
    };
    let magnitude = if scale == 1.0 { magnitude } else { magnitude.max(value.abs()) };
    let roundings = if scale == 1.0 { roundings } else { roundings.max(2.0) };
    let twice = if dtype == DType::F64 { 2.0 } else { 1.0 };
    let smallest = if dtype == DType::F16 { 2f64.powi(-24) } else { 0.0 };
    let tolerance = roundings * unit_roundoff(dtype) * magnitude * scale.abs() * 1.01 * twice;
    Expected::About(value * scale, if tolerance > 0.0 { tolerance + smallest } else { 0.0 })
}

fn integer(op: ReduceOp, dtype: DType, values: impl ExactSizeIterator<Item = i128> + Clone) -> Expected {
    let count = values.len() as i128;
    let sum: i128 = values.clone().sum();
    Expected::Exactly(match op {
        ReduceOp::Sum => wrapped(dtype, sum),
        ReduceOp::Average => sum.div_euclid(count),
        ReduceOp::Product => wrapped(dtype, values.fold(1, i128::wrapping_mul)),
        ReduceOp::Min => values.min().unwrap(),
        ReduceOp::Max => values.max().unwrap(),
        ReduceOp::Adasum => unreachable!("not of integers"),
    })
}

/// Panics at the first element that is not as expected.
pub fn assert_expected(dtype: DType, data: &[u8], expected: &[Expected], what: &str) {
    assert_eq!(data.len(), expected.len() * dtype.size(), "{what}: length");
    for (at, (bytes, expected)) in data.chunks(dtype.size()).zip(expected).enumerate() {
        match expected {
            Expected::Exactly(value) => assert_eq!(integers(dtype, bytes)[0], *value, "{what}: element {at}"),
            Expected::About(value, tolerance) => {
                let got = floats(dtype, bytes)[0];
                assert!((got - value).abs() <= *tolerance, "{what}: element {at}: {got}, not {value} ± {tolerance}");
            }
        }
    }
}
