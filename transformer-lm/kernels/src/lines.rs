//! Memory for what a loop computes on the way.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// Elements that begin with a line of the processor's cache: a vector, or a row of a tile, that lies across two lines is read and written
/// twice.
#[derive(Clone, Debug)]
pub struct Lines<T> {
    lines: Vec<Line>,
    len: usize,
    _elements: PhantomData<T>,
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    /// What this thread has used before, and will soon use again.
    static SPARE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// How many of them a thread keeps, the largest.
const MOST: usize = 16;

impl<T: Pod> Lines<T> {
    /// So many elements of any value: most often what this thread has used before, which need not be given back and fetched anew.
    pub fn any(len: usize) -> Self {
        const { assert!(size_of::<T>().is_power_of_two() && align_of::<T>() <= size_of::<Line>()) };
        let count = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        let lines = SPARE.with_borrow_mut(|spare| {
            let fits = |(_, lines): &(usize, &Vec<Line>)| lines.len() >= count;
            let least = spare.iter().enumerate().filter(fits).min_by_key(|(_, lines)| lines.len());
            least.map(|(at, _)| at).map(|at| spare.swap_remove(at))
        });
        Self { lines: lines.unwrap_or_else(|| vec![Line::zeroed(); count]), len, _elements: PhantomData }
    }
}

impl<T> Drop for Lines<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // A thread that ends has no spare ones any more.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            spare.push(lines);
            if spare.len() > MOST {
                let least = (0..=MOST).min_by_key(|&at| spare[at].len());
                least.map(|at| spare.swap_remove(at));
            }
        });
    }
}

impl<T: Pod> Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_begin_with_a_line() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let mut lines = Lines::<f32>::any(len);
            assert_eq!((lines.len(), lines.as_ptr() as usize % 64), (len, 0));
            lines.iter_mut().for_each(|value| *value = 1.0);
        }
    }

    #[test]
    fn a_thread_keeps_the_largest() {
        let (large, small) = (Lines::<f32>::any(5000), [(); MOST].map(|()| Lines::<f32>::any(1)));
        let place = large.as_ptr();
        drop(small);
        drop(large);
        assert_eq!(Lines::<f32>::any(5000).as_ptr(), place);
        SPARE.with_borrow(|spare| assert_eq!(spare.len(), MOST));
    }

    #[test]
    fn a_thread_uses_them_again() {
        let first = Lines::<f32>::any(1000);
        let place = first.as_ptr();
        drop(first);
        let [again, other] = [(); 2].map(|()| Lines::<u64>::any(400));
        assert_eq!(again.as_ptr().cast(), place);
        assert_ne!(other.as_ptr().cast(), place);
    }
}
