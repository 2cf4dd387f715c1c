//! Asking for memory before it is read. The processor does so by itself where one address follows another; not from row to row, and not far
//! enough ahead of loops that compute much for each byte.

use std::collections::VecDeque;

use super::View;

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Asks for the lines that hold so many elements from a place on, which need not exist.
#[inline(always)]
pub(crate) fn fetch<T>(place: *const T, elements: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        for line in (0..elements * size_of::<T>()).step_by(LINE) {
            // SAFETY: the instruction, which every processor of this architecture has, only advises, wherever that is.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast::<i8>().wrapping_add(line)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (place, elements);
}

/// Bytes that are asked for in one go, by eight instructions.
pub(crate) const RUN: usize = 8 * LINE;

/// Runs of [`RUN`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Runs {
    pub(crate) first: *const u8,
    /// Bytes from the beginning of one to that of the next.
    pub(crate) stride: usize,
    count: usize,
}

/// What is asked for, run by run, while something else is computed. Nothing of it is read, so it need not exist any more.
#[derive(Debug, Default)]
pub(crate) struct Ahead(VecDeque<Runs>);

#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code))] // nobody asks
impl Ahead {
    /// Adds a matrix: all of it in one go where its rows follow each other, or else the rows of some columns after those of others.
    pub(crate) fn push<T>(&mut self, matrix: View<T>) {
        let ([rows, columns], first) = (matrix.shape(), matrix.at(0).cast::<u8>());
        let [width, stride] = [columns, matrix.stride()].map(|elements| elements * size_of::<T>());
        if width == stride {
            return self.0.push_back(Runs { first, stride: RUN, count: (rows * width).div_ceil(RUN) });
        }
        for start in (0..width).step_by(RUN) {
            self.0.push_back(Runs { first: first.wrapping_add(start), stride, count: rows });
        }
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// The next `count` runs that are equally far apart; those that are fewer are passed over.
    pub(crate) fn take(&mut self, count: usize) -> Option<Runs> {
        while let Some(next) = self.0.front_mut() {
            if next.count >= count {
                let taken = Runs { count, ..*next };
                next.first = next.first.wrapping_add(count * next.stride);
                next.count -= count;
                return Some(taken);
            }
            self.0.pop_front();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes from the beginning of `matrix` at which what is taken, `count` at a time, begins.
    fn taken(matrix: View<u16>, count: usize) -> Vec<usize> {
        let mut ahead = Ahead::default();
        ahead.push(matrix);
        let start = matrix.at(0).addr();
        let all = std::iter::from_fn(|| ahead.take(count));
        all.flat_map(|runs| (0..count).map(move |at| runs.first.addr() + at * runs.stride - start)).collect()
    }

    #[test]
    fn rows_that_follow_each_other_are_one() {
        let elements = [0u16; 6 * 128];
        assert_eq!(taken(View::of(&elements, 128), 1), [0, 512, 1024]);
        assert_eq!(taken(View::of(&elements, 128), 2), [0, 512], "one is left");
        assert_eq!(taken(View::of(&elements[..10], 5), 1), [0], "what is begun");
    }

    #[test]
    fn of_wide_rows_some_columns_come_after_others() {
        let elements = [0u16; 4 * 400];
        let matrix = View::of(&elements, 400).columns(0..300);
        assert_eq!(taken(matrix, 2), [0, 800, 1600, 2400, 512, 1312, 2112, 2912]);
        assert_eq!(taken(matrix, 3), [0, 800, 1600, 512, 1312, 2112], "one of each is left");
    }

    #[test]
    fn what_is_forgotten_is_not_asked_for() {
        let mut ahead = Ahead::default();
        ahead.push(View::of(&[0u16; 512], 256));
        ahead.clear();
        assert_eq!(ahead.take(1), None);
    }
}
