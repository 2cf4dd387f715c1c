//! Parts of matrices that lie in somebody's memory, for several threads at once.

use std::marker::PhantomData;

/// Some rows of a matrix, and of each some neighbouring columns, to be read.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    first: *const T,
    rows: usize,
    columns: usize,
    stride: usize,
    _elements: PhantomData<&'a [T]>,
}

impl<'a, T> View<'a, T> {
    /// Rows of `columns` elements, each `stride` elements after the one before.
    ///
    /// # Safety
    /// The elements are valid while the view lives, and nobody writes to them.
    pub unsafe fn new(first: *const T, rows: usize, columns: usize, stride: usize) -> Self {
        Self { first, rows, columns, stride, _elements: PhantomData }
    }

    /// All of a slice.
    ///
    /// # Panics
    /// If it is not whole rows.
    pub fn of(elements: &'a [T], columns: usize) -> Self {
        assert!(columns > 0 && elements.len().is_multiple_of(columns));
        let rows = elements.len() / columns;
        Self { first: elements.as_ptr(), rows, columns, stride: columns, _elements: PhantomData }
    }

    /// Its rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// A row.
    ///
    /// # Panics
    /// If there are not so many.
    #[inline(always)]
    pub fn row(&self, at: usize) -> &'a [T] {
        assert!(at < self.rows);
        // SAFETY: `new` was promised that these are valid, and that nobody writes to them.
        unsafe { std::slice::from_raw_parts(self.first.add(at * self.stride), self.columns) }
    }
}

/// The same, to be written to.
pub struct Window<'a, T> {
    first: *mut T,
    rows: usize,
    columns: usize,
    stride: usize,
    _elements: PhantomData<&'a mut [T]>,
}

impl<'a, T> Window<'a, T> {
    /// Rows of `columns` elements, each `stride` elements after the one before.
    ///
    /// # Safety
    /// The elements are valid while the window lives, and nobody else uses them.
    pub unsafe fn new(first: *mut T, rows: usize, columns: usize, stride: usize) -> Self {
        Self { first, rows, columns, stride, _elements: PhantomData }
    }

    /// All of a slice.
    ///
    /// # Panics
    /// If it is not whole rows.
    pub fn of(elements: &'a mut [T], columns: usize) -> Self {
        assert!(columns > 0 && elements.len().is_multiple_of(columns));
        let rows = elements.len() / columns;
        Self { first: elements.as_mut_ptr(), rows, columns, stride: columns, _elements: PhantomData }
    }

    /// Its rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// A row.
    ///
    /// # Panics
    /// If there are not so many.
    #[inline(always)]
    pub fn row(&mut self, at: usize) -> &mut [T] {
        assert!(at < self.rows);
        // SAFETY: `new` was promised that these are valid, and ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(at * self.stride), self.columns) }
    }
}
