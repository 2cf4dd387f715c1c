//! The kernels against plain loops with the `half` crate's conversions, bit for bit.

mod elements;

use elements::*;
use half::{bf16, f16};
use hvd_core::collective::Reduction;
use hvd_core::{DType, ReduceOp, reduce, wire};

/// Vector widths, their neighbours, and the tails of each.
const LENGTHS: std::ops::RangeInclusive<usize> = 0..=130;

/// Copies `data` to where it is not aligned for its type, and gives it to `body`.
fn at_offset<R>(data: &[u8], offset: usize, body: impl FnOnce(&mut [u8]) -> R) -> R {
    let mut shifted = vec![0; data.len() + offset];
    shifted[offset..].copy_from_slice(data);
    body(&mut shifted[offset..])
}

/// `a ∘ b` for one element.
fn scalar(op: ReduceOp, dtype: DType, a: &[u8], b: &[u8]) -> Vec<u8> {
    macro_rules! float {
        ($type:ty, $wide:ty, $widen:expr, $narrow:expr) => {{
            let (a, b): ($wide, $wide) = (
                $widen(<$type>::from_ne_bytes(a.try_into().unwrap())),
                $widen(<$type>::from_ne_bytes(b.try_into().unwrap())),
            );
            let value = match op {
                ReduceOp::Sum | ReduceOp::Average => a + b,
                ReduceOp::Product => a * b,
                _ if a.is_nan() || b.is_nan() => <$wide>::NAN,
                ReduceOp::Min => {
                    if b < a {
                        b
                    } else {
                        a
                    }
                }
                ReduceOp::Max => {
                    if b > a {
                        b
                    } else {
                        a
                    }
                }
                ReduceOp::Adasum => unreachable!("not element by element"),
            };
            $narrow(value).to_ne_bytes().to_vec()
        }};
    }
    macro_rules! integer {
        ($type:ty) => {{
            let (a, b) = (<$type>::from_ne_bytes(a.try_into().unwrap()), <$type>::from_ne_bytes(b.try_into().unwrap()));
            let value = match op {
                ReduceOp::Sum | ReduceOp::Average => a.wrapping_add(b),
                ReduceOp::Product => a.wrapping_mul(b),
                ReduceOp::Min => a.min(b),
                ReduceOp::Max => a.max(b),
                ReduceOp::Adasum => unreachable!("not of integers"),
            };
            value.to_ne_bytes().to_vec()
        }};
    }
    match dtype {
        DType::F16 => float!(f16, f32, f16::to_f32, f16::from_f32),
        DType::BF16 => float!(bf16, f32, bf16::to_f32, bf16::from_f32),
        DType::F32 => float!(f32, f32, |value: f32| value, |value: f32| value),
        DType::F64 => float!(f64, f64, |value: f64| value, |value: f64| value),
        DType::I32 => integer!(i32),
        DType::I64 => integer!(i64),
        DType::I16 => integer!(i16),
        DType::I8 => integer!(i8),
        DType::U8 => integer!(u8),
        DType::Bool => vec![if op == ReduceOp::Min { a[0] & b[0] } else { a[0] | b[0] }],
    }
}

fn scalars(op: ReduceOp, dtype: DType, a: &[u8], b: &[u8]) -> Vec<u8> {
    let size = dtype.size();
    a.chunks(size).zip(b.chunks(size)).flat_map(|(a, b)| scalar(op, dtype, a, b)).collect()
}

/// Any bit patterns: subnormals, infinities, NaN, zeros of both signs. For bools only 0 and 1.
fn patterns(seed: u64, dtype: DType, count: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let special = [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e-40, 65504.0, f64::from(f32::MAX)];
    (0..count)
        .flat_map(|_| match (dtype, random.next() % 4) {
            (DType::F32, 0) => (special[random.next() as usize % 8] as f32).to_ne_bytes().to_vec(),
            (DType::F64, 0) => special[random.next() as usize % 8].to_ne_bytes().to_vec(),
            (DType::F16, 0) => f16::from_f64(special[random.next() as usize % 8]).to_ne_bytes().to_vec(),
            (DType::BF16, 0) => bf16::from_f64(special[random.next() as usize % 8]).to_ne_bytes().to_vec(),
            (DType::Bool, _) => vec![(random.next() & 1) as u8],
            _ => random.next().to_ne_bytes()[..dtype.size()].to_vec(),
        })
        .collect()
}

/// Equal bits; of a NaN the kernels keep neither sign nor payload, the scalar code may.
fn assert_same(dtype: DType, got: &[u8], expected: &[u8], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (at, (got, expected)) in got.chunks(dtype.size()).zip(expected.chunks(dtype.size())).enumerate() {
        let both_nan = dtype.is_float()
            && got != expected
            && floats(dtype, got)[0].is_nan()
            && floats(dtype, expected)[0].is_nan();
        assert!(both_nan || got == expected, "{what}: element {at}: {got:02x?}, not {expected:02x?}");
    }
}

#[test]
fn accumulate_is_the_scalar_loop() {
    for (op, dtype) in supported() {
        for length in LENGTHS {
            let (a, b) = (patterns(length as u64, dtype, length), patterns(1000 + length as u64, dtype, length));
            let expected = scalars(op, dtype, &a, &b);
            for offset in [0, 1, 3] {
                let got = at_offset(&a, offset, |into| {
                    at_offset(&b, 4 - offset, |from| reduce::accumulate(op, dtype, into, from));
                    into.to_vec()
                });
                assert_same(dtype, &got, &expected, &format!("{op:?} of {length} {dtype} at {offset}"));
            }
        }
    }
}

#[test]
fn combine_takes_its_inputs_in_order() {
    for (op, dtype) in supported() {
        for (length, count) in LENGTHS.map(|length| (length, 1 + length % 5)).chain([(2500, 2), (2500, 3), (3000, 4)]) {
            let inputs: Vec<_> = (0..count).map(|rank| random_elements(rank as u64, op, dtype, length)).collect();
            let padded: Vec<_> = inputs.iter().map(|input| [&[0][..], input].concat()).collect();
            let slices: Vec<_> = padded.iter().map(|input| &input[1..]).collect();
            let mut out = vec![0xaa; length * dtype.size()];
            reduce::combine(op, dtype, &mut out, &slices, 1.0);
            let what = format!("{op:?} of {count} times {length} {dtype}");
            assert_expected(dtype, &out, &reference(op, dtype, &inputs, 1.0), &what);
            if matches!(dtype, DType::F32 | DType::F64) && op != ReduceOp::Average {
                let in_order = inputs[1..].iter().fold(inputs[0].clone(), |sum, next| scalars(op, dtype, &sum, next));
                assert_same(dtype, &out, &in_order, &what);
            }
        }
    }
}

/// The sum of 2048 and sixteen times 1 is 2064: added one by one in f16 it would stay 2048.
#[test]
fn combine_rounds_sixteen_bits_once() {
    let one = |value: f32| f16::from_f32(value).to_ne_bytes();
    let mut inputs = vec![one(2048.0)];
    inputs.extend([one(1.0); 16]);
    let inputs: Vec<&[u8]> = inputs.iter().map(|input| &input[..]).collect();
    let mut out = [0; 2];
    reduce::combine(ReduceOp::Sum, DType::F16, &mut out, &inputs, 1.0);
    assert_eq!(f16::from_ne_bytes(out).to_f32(), 2064.0);
}

/// Where a sum is exact, so is the average: no reciprocal is rounded on the way.
#[test]
fn the_average_of_equals_is_that_value() {
    for ranks in 1..=17 {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let data: Vec<u8> = (1..=100)
                .flat_map(|value| match dtype {
                    DType::F16 => f16::from_f64(f64::from(value)).to_ne_bytes().to_vec(),
                    DType::BF16 => bf16::from_f64(f64::from(value)).to_ne_bytes().to_vec(),
                    DType::F32 => (value as f32).to_ne_bytes().to_vec(),
                    _ => f64::from(value).to_ne_bytes().to_vec(),
                })
                .collect();
            let mut out = vec![0; data.len()];
            reduce::combine(ReduceOp::Average, dtype, &mut out, &vec![&data[..]; ranks], 1.0);
            assert_eq!(out, data, "{ranks} times {dtype}");
        }
    }
}

#[test]
fn combine_both_gives_the_bits_of_combine_twice() {
    for (op, dtype) in supported() {
        for (length, scale) in LENGTHS.map(|length| (length, 1.0)).chain([(2500, 0.5), (2500, 1.0 / 3.0)]) {
            let [mut first, mut second] = [0, 1].map(|rank| random_elements(rank, op, dtype, length));
            let mut combined = vec![0; first.len()];
            reduce::combine(op, dtype, &mut combined, &[&first, &second], scale);
            reduce::combine_both(op, dtype, &mut first, &mut second, scale);
            assert!(first == combined && second == combined, "{op:?} of {length} {dtype}, scale {scale}");
        }
    }
}

#[test]
fn finish_does_what_combine_does_at_the_end() {
    for (op, dtype) in supported().into_iter().filter(|(_, dtype)| dtype.size() >= 4) {
        for (ranks, scale) in [(1, 1.0), (2, 0.5), (3, 1.0), (5, 0.1), (8, 1.0 / 3.0)] {
            let inputs: Vec<_> = (0..ranks).map(|rank| random_elements(rank, op, dtype, 67)).collect();
            let slices: Vec<_> = inputs.iter().map(|input| &input[..]).collect();
            let mut combined = vec![0; inputs[0].len()];
            reduce::combine(op, dtype, &mut combined, &slices, scale);
            let mut finished = inputs[0].clone();
            inputs[1..].iter().for_each(|next| reduce::accumulate(op, dtype, &mut finished, next));
            reduce::finish(&Reduction { dtype, op, scale }, ranks as usize, &mut finished);
            assert_eq!(finished, combined, "{op:?} of {dtype} over {ranks} ranks, scale {scale}");
        }
    }
}

#[test]
fn integers_are_averaged_downwards() {
    let mut data: Vec<u8> = [-7, -6, -1, 0, 1, 7].iter().flat_map(|value: &i32| value.to_ne_bytes()).collect();
    reduce::finish(&Reduction::new(DType::I32, ReduceOp::Average), 3, &mut data);
    assert_eq!(integers(DType::I32, &data), [-3, -2, -1, 0, 0, 2]);
}

#[test]
#[should_panic(expected = "not defined")]
fn a_sum_of_bools_is_refused() {
    reduce::accumulate(ReduceOp::Sum, DType::Bool, &mut [0], &[1]);
}

fn converted(from: DType, src: &[u8], to: DType, factor: f64) -> Vec<u8> {
    let mut dst = vec![0xaa; src.len() / from.size() * to.size()];
    wire::convert(from, src, to, &mut dst, factor);
    dst
}

#[test]
fn widening_is_exact_for_all_patterns() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    let every = || 0..=u16::MAX;
    let f32s = |values: &mut dyn Iterator<Item = f32>| values.flat_map(f32::to_ne_bytes).collect::<Vec<_>>();
    let f64s = |values: &mut dyn Iterator<Item = f64>| values.flat_map(f64::to_ne_bytes).collect::<Vec<_>>();
    let half = |bits| f16::from_bits(bits);
    let brain = |bits| bf16::from_bits(bits);
    let check = |from, to, expected: Vec<u8>| {
        assert_same(to, &converted(from, &all, to, 1.0), &expected, &format!("{from} to {to}"));
    };
    check(DType::F16, DType::F32, f32s(&mut every().map(|bits| half(bits).to_f32())));
    check(DType::F16, DType::F64, f64s(&mut every().map(|bits| half(bits).to_f64())));
    check(DType::BF16, DType::F32, f32s(&mut every().map(|bits| brain(bits).to_f32())));
    check(DType::BF16, DType::F64, f64s(&mut every().map(|bits| brain(bits).to_f64())));
}

#[test]
fn there_and_back_changes_nothing() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    for narrow in [DType::F16, DType::BF16] {
        for wide in [DType::F32, DType::F64] {
            let back = converted(wide, &converted(narrow, &all, wide, 1.0), narrow, 1.0);
            assert_same(narrow, &back, &all, &format!("{narrow} by way of {wide}"));
        }
    }
}

/// All the numbers half way between two neighbours, the next ones to either side, and random patterns.
fn hard_to_round(dtype: DType) -> Vec<f64> {
    let value =
        |bits: u16| if dtype == DType::F16 { f16::from_bits(bits).to_f64() } else { bf16::from_bits(bits).to_f64() };
    let infinity = if dtype == DType::F16 { 0x7c00u16 } else { 0x7f80 };
    let mut values: Vec<f64> = (0..infinity - 1).map(|bits| (value(bits) + value(bits + 1)) / 2.0).collect();
    // Half way from the greatest to what would come next.
    values.push(value(infinity - 1) * 1.5 - value(infinity - 2) / 2.0);
    values.extend([f64::NAN, f64::INFINITY, f64::MAX, f64::MIN_POSITIVE, 5e-324, 0.0, 1e-45]);
    values.iter().flat_map(|value| [*value, -value]).collect()
}

#[test]
fn narrowing_goes_to_the_nearest_and_ties_to_even() {
    for narrow in [DType::F16, DType::BF16] {
        let ties = hard_to_round(narrow);
        let f32s = ties.iter().flat_map(|tie| [*tie as f32, (*tie as f32).next_up(), (*tie as f32).next_down()]);
        let mut random = Random(3);
        let f32s: Vec<f32> = f32s.chain((0..100_000).map(|_| f32::from_bits(random.next() as u32))).collect();
        let f64s: Vec<f64> = ties.iter().flat_map(|tie| [*tie, tie.next_up(), tie.next_down()]).collect();
        let src: Vec<u8> = f32s.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let expected: Vec<u8> =
            f32s.iter().flat_map(|value| correctly_rounded(narrow, f64::from(*value)).to_ne_bytes()).collect();
        assert_same(narrow, &converted(DType::F32, &src, narrow, 1.0), &expected, &format!("f32 to {narrow}"));
        let src: Vec<u8> = f64s.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let expected: Vec<u8> = f64s.iter().flat_map(|value| correctly_rounded(narrow, *value).to_ne_bytes()).collect();
        assert_same(narrow, &converted(DType::F64, &src, narrow, 1.0), &expected, &format!("f64 to {narrow}"));
    }
}

/// The nearest 16-bit float, by looking among all of them: ties to the one with an even pattern. (`from_f64` of the
/// `half` crate drops the lower half of the f64 first.)
fn correctly_rounded(dtype: DType, value: f64) -> u16 {
    let (infinity, of): (u16, fn(u16) -> f64) = match dtype {
        DType::F16 => (0x7c00, |bits| f16::from_bits(bits).to_f64()),
        _ => (0x7f80, |bits| bf16::from_bits(bits).to_f64()),
    };
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let magnitude = value.abs();
    if value.is_nan() {
        return infinity | 0x40;
    }
    let (mut low, mut high) = (0, infinity);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if of(middle) <= magnitude { low = middle } else { high = middle }
    }
    let above = if high == infinity { of(low) * 2.0 - of(low - 1) } else { of(high) };
    let middle = (of(low) + above) / 2.0;
    let up = magnitude > middle || (magnitude == middle && low & 1 == 1);
    sign | if up { high } else { low }
}

#[test]
fn a_factor_is_applied_before_rounding() {
    for length in LENGTHS {
        let src = random_elements(length as u64, ReduceOp::Sum, DType::F32, length);
        let expected: Vec<u8> = floats(DType::F32, &src)
            .iter()
            .flat_map(|value| f16::from_f32((value / 4.0) as f32).to_ne_bytes())
            .collect();
        let got = at_offset(&src, 1, |src| converted(DType::F32, src, DType::F16, 0.25));
        assert_eq!(got, expected);
    }
}

#[test]
fn equal_types_are_copied_and_floats_scaled() {
    for dtype in DType::ALL {
        let src = patterns(1, dtype, 77);
        assert_eq!(converted(dtype, &src, dtype, 1.0), src, "{dtype}");
        let src = random_elements(1, ReduceOp::Sum, dtype, 77);
        let mut scaled = src.clone();
        wire::scale(dtype, &mut scaled, 0.3);
        assert_eq!(converted(dtype, &src, dtype, 0.3), scaled, "{dtype}");
        if dtype.is_float() {
            for (value, scaled) in floats(dtype, &src).iter().zip(floats(dtype, &scaled)) {
                assert!((value * 0.3 - scaled).abs() <= 1.01 * unit_roundoff(dtype) * scaled.abs().max(2f64.powi(-14)));
            }
        } else {
            assert_eq!(scaled, src);
        }
    }
}
