//! Layer normalisation (Ba et al., 2016), sums over rows, and sums of matrices.
//!
//! Matrices lie row by row; vectors have an element for each column.

use super::{Element, LANES, fold, total};
use half::bf16;
use hvd_kernels::simd::{Isa, Kernel, dispatch};

/// A normalisation's parameters.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// Multiplies what was normalised.
    pub weight: &'a [f32],
    /// Is added then.
    pub bias: &'a [f32],
    /// Is added to the variance.
    pub eps: f32,
}

/// Mean and reciprocal standard deviation of each row, one after the other.
pub type Moments = [f32; 2];

/// `out = normalised(rows) · weight + bias`, and the rows' moments, where somebody wants them.
///
/// # Panics
/// If the shapes do not fit; so below.
pub fn normalise<E: Element>(rows: &[f32], norm: Norm, out: &mut [E], moments: Option<&mut [Moments]>) {
    let columns = norm.weight.len();
    check(columns, [rows.len(), out.len(), moments.as_ref().map_or(out.len(), |moments| moments.len() * columns)]);
    assert_eq!(norm.bias.len(), columns);
    dispatch(Normalise { rows, norm, out, moments });
}

/// What [`normalise_backward`] reads.
#[derive(Clone, Copy)]
pub struct Normalised<'a, E> {
    /// What was normalised.
    pub rows: &'a [f32],
    /// What [`normalise`] gave beside its result.
    pub moments: &'a [Moments],
    /// The normalisation's weight.
    pub weight: &'a [f32],
    /// The result's gradient.
    pub grad: &'a [E],
}

/// Sums over rows, which gradients are added to.
pub struct ColumnSums<'a> {
    /// The weight's.
    pub weight: &'a mut [f32],
    /// The bias's.
    pub bias: &'a mut [f32],
    /// Those of the gradient of the rows, `out`: of the branch's bias.
    pub rows: &'a mut [f32],
}

/// `out` becomes the gradient of the rows: that of the normalised, and `direct`, what reaches them past the normalisation; and `narrow`, where
/// somebody wants it, the same in 16 bits.
pub fn normalise_backward<E: Element>(
    given: Normalised<E>,
    direct: Option<&[f32]>,
    out: &mut [f32],
    narrow: Option<&mut [bf16]>,
    sums: ColumnSums,
) {
    let columns = given.weight.len();
    check(columns, [given.rows.len(), given.grad.len(), out.len()]);
    check(columns, [given.moments.len() * columns, direct.map_or(out.len(), <[f32]>::len), out.len()]);
    assert!([sums.weight.len(), sums.bias.len(), sums.rows.len()] == [columns; 3]);
    assert!(narrow.as_ref().is_none_or(|narrow| narrow.len() == out.len()));
    dispatch(Backward { given, direct, out, narrow, sums });
}

/// Adds each of the rows, which are as long as `sum`, to it.
pub fn add_rows<E: Element>(rows: &[E], sum: &mut [f32]) {
    check(sum.len(), [rows.len(); 3]);
    dispatch(AddRows { rows, sum });
}

/// `sum += factor · values`.
pub fn add_scaled(values: &[f32], factor: f32, sum: &mut [f32]) {
    assert_eq!(values.len(), sum.len());
    dispatch(AddScaled { values, factor, sum });
}

fn check(columns: usize, lengths: [usize; 3]) {
    assert!(columns > 0 && lengths[0].is_multiple_of(columns) && lengths.iter().all(|length| *length == lengths[0]));
}

struct Normalise<'a, E> {
    rows: &'a [f32],
    norm: Norm<'a>,
    out: &'a mut [E],
    moments: Option<&'a mut [Moments]>,
}

impl<E: Element> Kernel for Normalise<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let Norm { weight, bias, eps } = self.norm;
        let columns = weight.len();
        let bias = &bias[..columns];
        let share = 1.0 / columns as f32;
        let rows = self.rows.chunks_exact(columns).zip(self.out.chunks_exact_mut(columns));
        for (at, (row, out)) in rows.enumerate() {
            let mean = fold(row, 0.0, |value| value, |a, b| a + b) * share;
            let variance = fold(row, 0.0, |value| (value - mean) * (value - mean), |a, b| a + b) * share;
            let scale = 1.0 / (variance + eps).sqrt();
            if let Some(moments) = &mut self.moments {
                moments[at] = [mean, scale];
            }
            for i in 0..columns {
                out[i] = E::narrow((row[i] - mean) * scale * weight[i] + bias[i]);
            }
        }
    }
}

struct Backward<'a, E> {
    given: Normalised<'a, E>,
    direct: Option<&'a [f32]>,
    out: &'a mut [f32],
    narrow: Option<&'a mut [bf16]>,
    sums: ColumnSums<'a>,
}

impl<E: Element> Kernel for Backward<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let Normalised { rows, moments, weight, grad } = self.given;
        let columns = weight.len();
        let [of_weight, of_bias, of_rows] =
            [self.sums.weight, self.sums.bias, self.sums.rows].map(|sums| &mut sums[..columns]);
        let share = 1.0 / columns as f32;
        for (at, out) in self.out.chunks_exact_mut(columns).enumerate() {
            let place = at * columns..(at + 1) * columns;
            let (row, grad, [mean, scale]) = (&rows[place.clone()], &grad[place.clone()], moments[at]);
            let (sum, product) = projections(row, grad, weight, mean, scale);
            let (sum, product) = (sum * share, product * share);
            for i in 0..columns {
                let (normal, grad) = ((row[i] - mean) * scale, grad[i].widen());
                out[i] = (grad * weight[i] - sum - normal * product) * scale;
                of_weight[i] = grad.mul_add(normal, of_weight[i]);
                of_bias[i] += grad;
            }
            if let Some(direct) = self.direct {
                let direct = &direct[place.clone()];
                for i in 0..columns {
                    out[i] += direct[i];
                }
            }
            for i in 0..columns {
                of_rows[i] += out[i];
            }
            if let Some(narrow) = &mut self.narrow {
                bf16::narrow_all::<I>(out, &mut narrow[place]);
            }
        }
    }
}

/// The sums of a row's weighted gradients, and of these times what was normalised.
#[inline(always)]
fn projections<E: Element>(row: &[f32], grad: &[E], weight: &[f32], mean: f32, scale: f32) -> (f32, f32) {
    let term = |row: f32, grad: E, weight: f32| {
        let weighted = grad.widen() * weight;
        (weighted, (row - mean) * scale)
    };
    let ((rows, row), (grads, grad)) = (row.as_chunks::<LANES>(), grad.as_chunks::<LANES>());
    let (weights, weight) = weight.as_chunks::<LANES>();
    let [mut sums, mut products] = [[0.0f32; LANES]; 2];
    for ((row, grad), weight) in rows.iter().zip(grads).zip(weights) {
        for lane in 0..LANES {
            let (weighted, normal) = term(row[lane], grad[lane], weight[lane]);
            sums[lane] += weighted;
            products[lane] = weighted.mul_add(normal, products[lane]);
        }
    }
    let rest = row.iter().zip(grad).zip(weight);
    rest.fold((total(sums), total(products)), |(sum, product), ((row, grad), weight)| {
        let (weighted, normal) = term(*row, *grad, *weight);
        (sum + weighted, weighted.mul_add(normal, product))
    })
}

struct AddRows<'a, E> {
    rows: &'a [E],
    sum: &'a mut [f32],
}

impl<E: Element> Kernel for AddRows<'_, E> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for row in self.rows.chunks_exact(self.sum.len()) {
            for (sum, value) in self.sum.iter_mut().zip(row) {
                *sum += value.widen();
            }
        }
    }
}

pub(super) struct AddScaled<'a> {
    pub values: &'a [f32],
    pub factor: f32,
    pub sum: &'a mut [f32],
}

impl Kernel for AddScaled<'_> {
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (sum, value) in self.sum.iter_mut().zip(self.values) {
            *sum = self.factor.mul_add(*value, *sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_levels, numbers};
    use super::*;
    use hvd_kernels::simd::dispatch_at;

    #[test]
    fn a_normal_row_has_no_mean_and_a_variance_of_one() {
        let rows = numbers(2 * 37);
        let normal = |weight: &[f32], bias: &[f32]| {
            let mut out = vec![0.0; 2 * 37];
            normalise(&rows, Norm { weight, bias, eps: 0.0 }, &mut out, None);
            out
        };
        let plain = normal(&[1.0; 37], &[0.0; 37]);
        let mean = |values: &[f32]| values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len() as f64;
        for row in plain.chunks(37) {
            let squares: Vec<f32> = row.iter().map(|value| value * value).collect();
            assert!(mean(row).abs() < 1e-6 && (mean(&squares) - 1.0).abs() < 1e-6);
        }
        let (weight, bias) = rows.split_at(37);
        let moved = normal(weight, bias);
        assert!((0..2 * 37).all(|i| (plain[i] * weight[i % 37] + bias[i % 37] - moved[i]).abs() < 1e-5));
    }

    #[test]
    fn rows_are_added() {
        let mut sum = [9.0, 8.0];
        add_rows(&[1.0, 2.0, 10.0, 20.0], &mut sum);
        assert_eq!(sum, [20.0, 30.0]);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        const COLUMNS: usize = 53;
        let all = numbers(11 * COLUMNS);
        let (rows, rest) = all.split_at(3 * COLUMNS);
        let (direct, rest) = rest.split_at(3 * COLUMNS);
        let (incoming, vectors) = rest.split_at(3 * COLUMNS);
        let (weight, bias) = vectors.split_at(COLUMNS);
        check_levels(|level| {
            let (mut out, mut grad) = (vec![0.0; 3 * COLUMNS], vec![0.0; 3 * COLUMNS]);
            let mut moments = vec![Moments::default(); 3];
            let norm = Norm { weight, bias, eps: 1e-5 };
            dispatch_at(level, Normalise { rows, norm, out: &mut out, moments: Some(&mut moments) });
            let [mut of_weight, mut of_bias, mut of_rows, mut columns] = [(); 4].map(|()| vec![0.5; COLUMNS]);
            let sums = ColumnSums { weight: &mut of_weight, bias: &mut of_bias, rows: &mut of_rows };
            let given = Normalised { rows, moments: &moments, weight, grad: incoming };
            let mut rounded = vec![bf16::ZERO; 3 * COLUMNS];
            let (direct, narrow) = (Some(direct), Some(&mut rounded[..]));
            dispatch_at(level, Backward { given, direct, out: &mut grad, narrow, sums });
            assert!(rounded.iter().zip(&grad).all(|(rounded, value)| *rounded == bf16::from_f32(*value)));
            dispatch_at(level, AddRows { rows: &out, sum: &mut columns });
            dispatch_at(level, AddScaled { values: rows, factor: 0.3, sum: &mut out });
            [out, moments.concat(), grad, of_weight, of_bias, of_rows, columns].concat()
        });
    }
}
