//! Memory for what a loop computes on the way.

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

impl<T: Pod> Lines<T> {
    /// So many zeros.
    pub fn zeros(len: usize) -> Self {
        const { assert!(size_of::<T>().is_power_of_two() && align_of::<T>() <= size_of::<Line>()) };
        let lines = vec![Line::zeroed(); (len * size_of::<T>()).div_ceil(size_of::<Line>())];
        Self { lines, len, _elements: PhantomData }
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
            let mut lines = Lines::<f32>::zeros(len);
            assert_eq!((&lines[..], lines.as_ptr() as usize % 64), (&vec![0.0; len][..], 0));
            lines.iter_mut().for_each(|value| *value = 1.0);
            assert_eq!(lines.len(), len);
        }
    }
}
