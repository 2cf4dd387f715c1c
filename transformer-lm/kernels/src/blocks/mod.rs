//! Products of blocks of bf16 with sums in f32, on the processor's matrix unit or its vectors.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod vectors;

use std::marker::PhantomData;
use std::sync::OnceLock;

use half::bf16;

use super::fetch::Ahead;
use super::{PANEL, PanelRow, View, Window};

/// What multiplies bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Vectors of 512 bits with AVX-512 BF16.
    Vectors,
    /// The tiles of Intel AMX.
    Tiles,
}

impl Unit {
    /// The quickest that this processor has, and the system allows; none where it has neither.
    pub fn best() -> Option<Unit> {
        static BEST: OnceLock<Option<Unit>> = OnceLock::new();
        *BEST.get_or_init(|| Unit::available().last())
    }

    /// All that this processor has: for tests that compare them.
    pub fn available() -> impl Iterator<Item = Unit> {
        [Unit::Vectors, Unit::Tiles].into_iter().filter(|unit| unit.is_available())
    }

    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Unit::Vectors => vectors::is_available(),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Unit::Tiles => amx::is_available(),
            #[allow(unreachable_patterns)] // on a processor that has both
            _ => false,
        }
    }
}

/// Multiplies on the thread that made it. It holds the thread's part of the unit, and gives it back when it is dropped.
#[derive(Debug)]
pub struct Multiplier {
    unit: Unit,
    /// What is read next.
    ahead: Ahead,
    _not_send: PhantomData<*const ()>,
}

impl Multiplier {
    /// Takes the best unit; none where there is none.
    ///
    /// # Safety
    /// As for [`Multiplier::new`].
    pub unsafe fn best() -> Option<Multiplier> {
        // SAFETY: the caller's promise.
        Unit::best().map(|unit| unsafe { Multiplier::new(unit) })
    }

    /// Takes a unit.
    ///
    /// # Safety
    /// Until it is dropped this thread calls no library that multiplies by tiles itself: each would use them with the other's configuration.
    /// Several of these may live at once.
    ///
    /// # Panics
    /// If the processor does not have the unit.
    pub unsafe fn new(unit: Unit) -> Multiplier {
        assert!(unit.is_available(), "no {unit:?} here");
        Multiplier { unit, ahead: Ahead::default(), _not_send: PhantomData }
    }

    /// Says what is read after what is multiplied next, and after what was said before. Tiles ask for it meanwhile, so that it comes from memory
    /// while the processor computes: as much of it as there is time for.
    pub fn ask_for<T>(&mut self, matrix: View<T>) {
        self.ahead.push(matrix);
    }

    /// Takes back what it has not yet asked for.
    pub fn forget(&mut self) {
        self.ahead.clear();
    }

    /// `sums = left · panel`, or `sums += left · panel` where it adds. The order in which an element is summed depends on the depth alone.
    ///
    /// # Panics
    /// If the left matrix is not as wide as the panel is deep (two rows of it in each of the panel's) or has no columns, or the sums are not
    /// as many rows of [`PANEL`].
    #[inline]
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] // there is no unit
    pub fn multiply(&mut self, left: View<bf16>, panel: &[PanelRow], sums: &mut Window<f32>, adds: bool) {
        let ([rows, depth], [height, width]) = (left.shape(), sums.shape());
        let fits = depth == 2 * panel.len() && rows == height && width == PANEL;
        assert!(fits && depth > 0, "matrices that do not fit");
        match self.unit {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            // SAFETY: `new` has found that the processor has tiles, and was promised that nobody else uses them; the shapes fit.
            Unit::Tiles => unsafe { amx::multiply(left, panel, sums, adds, &mut self.ahead) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` has found that the processor has these instructions; the shapes fit.
            Unit::Vectors => unsafe { vectors::multiply(left, panel, sums, adds) },
            #[allow(unreachable_patterns)] // as above
            _ => unreachable!("`new` takes no other unit"),
        }
    }
}

impl Drop for Multiplier {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        amx::release();
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::numbers;
    use super::super::{Element, pack_rows};
    use super::*;

    /// A matrix's elements, and what lies between its rows: nothing that may come into a product.
    fn matrix(rows: usize, columns: usize, stride: usize) -> Vec<bf16> {
        let mut all = vec![bf16::NAN; rows * stride];
        for (row, values) in all.chunks_mut(stride).zip(numbers(rows * columns).chunks(columns)) {
            row.iter_mut().zip(values).for_each(|(to, value)| *to = bf16::narrow(*value));
        }
        all
    }

    fn check(unit: Unit, rows: usize, depth: usize, columns: usize) {
        let strides = [depth + 3, columns + 1, PANEL + 5];
        let (a, b) = (matrix(rows, depth, strides[0]), matrix(depth, columns, strides[1]));
        let mut panel = vec![[7; PANEL]; depth / 2];
        pack_rows(View::of(&b, strides[1]).columns(0..columns), Window::of(&mut panel, depth / 2));
        let left = View::of(&a, strides[0]).columns(0..depth);
        let mut sums = vec![0.5; rows * strides[2]];
        // SAFETY: nobody else multiplies on this thread.
        let mut multiplier = unsafe { Multiplier::new(unit) };
        for times in 1..=2 {
            // Of what is asked for nothing comes into the sums.
            multiplier.ask_for(View::of(&b, strides[1]).columns(0..columns));
            // SAFETY: the rows lie in the vector.
            let mut into = unsafe { Window::new(sums.as_mut_ptr(), rows, PANEL, strides[2]) };
            multiplier.multiply(left, &panel, &mut into, times > 1);
            for (at, sum) in sums.iter().enumerate() {
                let (row, column) = (at / strides[2], at % strides[2]);
                let term = |k: usize| f64::from(a[row * strides[0] + k]) * f64::from(b[k * strides[1] + column]);
                let [expected, size] = match column {
                    _ if column < columns => [0, 1].map(|power| {
                        f64::from(times)
                            * (0..depth).map(|k| if power == 1 { term(k).abs() } else { term(k) }).sum::<f64>()
                    }),
                    _ if column < PANEL => [0.0, 0.0],
                    _ => [0.5, 0.0],
                };
                let error = (f64::from(*sum) - expected).abs();
                assert!(
                    error <= 1e-6 * size,
                    "{unit:?} {rows} {depth} {columns}: {sum} for {expected} at {row}, {column}"
                );
            }
        }
    }

    /// Units to test, or a word where there are none.
    fn units() -> Vec<Unit> {
        let units: Vec<Unit> = Unit::available().collect();
        if units.is_empty() {
            println!("skipped: this processor has no products of bf16");
        }
        units
    }

    #[test]
    fn several_multipliers_take_turns() {
        for unit in units() {
            let (a, mut panel) = (matrix(33, 32, 32), vec![[0; PANEL]; 16]);
            pack_rows(View::of(&matrix(32, PANEL, PANEL), PANEL), Window::of(&mut panel, 16));
            let product = |multiplier: &mut Multiplier, rows: usize| {
                let mut sums = vec![0.0; rows * PANEL];
                multiplier.multiply(View::of(&a[..rows * 32], 32), &panel, &mut Window::of(&mut sums, PANEL), false);
                sums
            };
            // SAFETY: as above.
            let [mut one, mut other] = [(); 2].map(|()| unsafe { Multiplier::new(unit) });
            let first = product(&mut one, 33);
            assert_eq!(product(&mut other, 7), first[..7 * PANEL]);
            assert_eq!(product(&mut one, 33), first);
            drop(other);
            assert_eq!(product(&mut one, 33), first);
        }
    }

    #[test]
    fn products_of_any_shape_are_those_of_plain_sums() {
        for unit in units() {
            for rows in [0, 1, 2, 15, 16, 17, 32, 33, 65] {
                for depth in [2, 6, 30, 32, 34, 96, 130] {
                    check(unit, rows, depth, if rows % 2 == 0 { 64 } else { 37 });
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_wherever_it_lies() {
        let (rows, depth) = (50, 70);
        let (a, b) = (matrix(rows, depth, depth), matrix(depth, PANEL, PANEL));
        let mut panel = vec![[0; PANEL]; depth / 2];
        pack_rows(View::of(&b, PANEL), Window::of(&mut panel, depth / 2));
        for unit in units() {
            let product = |rows: std::ops::Range<usize>| {
                let mut sums = vec![0.0; rows.len() * PANEL];
                let left = View::of(&a[rows.start * depth..rows.end * depth], depth);
                // SAFETY: as above.
                let mut multiplier = unsafe { Multiplier::new(unit) };
                multiplier.multiply(left, &panel, &mut Window::of(&mut sums, PANEL), false);
                sums
            };
            let whole = product(0..rows);
            for start in [1, 7, 16, 31, 49] {
                assert_eq!(product(start..rows), whole[start * PANEL..], "{unit:?}");
            }
        }
    }
}
