//! Parts of matrices that lie in somebody's memory, for several threads at once.

use std::marker::PhantomData;
use std::ops::Range;

use hvd_kernels::simd::Isa;

use super::Element;

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

    /// Its elements from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Where a row begins, which must be one of them to be read.
    pub(crate) fn at(&self, row: usize) -> *const T {
        self.first.wrapping_add(row * self.stride)
    }

    /// Some of its rows.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        Self { first: self.first.wrapping_add(rows.start * self.stride), rows: rows.len(), ..self }
    }

    /// Some of its columns.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn columns(self, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= self.columns);
        Self { first: self.first.wrapping_add(columns.start), columns: columns.len(), ..self }
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
    streamed: bool,
    _elements: PhantomData<&'a mut [T]>,
}

impl<'a, T> Window<'a, T> {
    /// Rows of `columns` elements, each `stride` elements after the one before.
    ///
    /// # Safety
    /// The elements are valid while the window lives, and nobody else uses them.
    pub unsafe fn new(first: *mut T, rows: usize, columns: usize, stride: usize) -> Self {
        Self { first, rows, columns, stride, streamed: false, _elements: PhantomData }
    }

    /// All of a slice.
    ///
    /// # Panics
    /// If it is not whole rows.
    pub fn of(elements: &'a mut [T], columns: usize) -> Self {
        assert!(columns > 0 && elements.len().is_multiple_of(columns));
        let rows = elements.len() / columns;
        let (first, stride) = (elements.as_mut_ptr(), columns);
        Self { first, rows, columns, stride, streamed: false, _elements: PhantomData }
    }

    /// The same, written past the caches: for more than these hold, of which nobody will read much before it has left them anyway. A line
    /// of memory need not be read first then to be written.
    ///
    /// # Safety
    /// The thread that writes calls [`finish_streams`](super::finish_streams) before anybody, itself included, uses these elements again.
    pub unsafe fn streamed(self) -> Self {
        Self { streamed: true, ..self }
    }

    /// Its rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Its elements from one row to the next.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Where a row begins, which must be one of them to be used.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(crate) fn at(&mut self, row: usize) -> *mut T {
        self.first.wrapping_add(row * self.stride)
    }

    /// Some of its columns.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn columns(self, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= self.columns);
        Self { first: self.first.wrapping_add(columns.start), columns: columns.len(), ..self }
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

impl<E: Element> Window<'_, E> {
    /// Gives a row these values, rounded.
    #[inline(always)]
    pub(crate) fn fill<I: Isa>(&mut self, row: usize, values: &[f32]) {
        match self.streamed {
            // SAFETY: `streamed` was promised that the thread waits for it.
            true => unsafe { E::stream_all::<I>(values, self.row(row)) },
            false => E::narrow_all::<I>(values, self.row(row)),
        }
    }
}

/// Waits until all that this thread has [streamed](Window::streamed) is where other threads see it.
pub fn finish_streams() {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe)] // later versions of Rust may find it safe
    // SAFETY: every processor of this architecture has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
