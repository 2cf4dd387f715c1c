//! The elements of tensors, for loops that run on several threads, and products of parts of them.

use std::ffi::c_char;
use std::ops::Range;

use half::bf16;
use hvd_torch::parallel_for;
use lm_kernels::{Pair, View, Window};
use tch::{Device, Kind, Tensor};

use super::holds;

/// The most ranges that [`sum_over_rows`] sums apart.
const PARTS: usize = 32;

/// Bytes of a result from which on it goes past the caches.
const STREAMED: usize = 2 << 20;

/// Sums over rows: runs `body` for ranges that cover `0..rows`, each with `columns` zeros of its own to add to, and adds these up. Ranges
/// and order follow from the number of rows alone.
pub(super) fn sum_over_rows(
    rows: usize,
    columns: usize,
    body: &(dyn Fn(Range<usize>, &mut [f32]) + Sync),
) -> hvd_torch::Result<Tensor> {
    let floats = (Kind::Float, Device::Cpu);
    let share = rows.div_ceil(PARTS).max(1);
    let parts = rows.div_ceil(share);
    let all = Tensor::f_zeros([parts as i64, columns as i64], floats)?;
    let span = Span::of(&all);
    parallel_for(parts, 1, &|range| {
        for part in range {
            // SAFETY: each part's sums belong to one thread.
            let sums = unsafe { span.write(part * columns..(part + 1) * columns) };
            body(part * share..rows.min((part + 1) * share), sums);
        }
    })?;
    let total = Tensor::f_zeros([columns as i64], floats)?;
    // SAFETY: nobody else knows them.
    unsafe { lm_kernels::add_rows(span.all(), Span::of(&total).write(0..columns)) };
    Ok(total)
}

/// What a tensor can hold, as these loops see it.
pub(in crate::model) trait Held: Copy + Send + Sync + 'static {
    /// The tensor's kind.
    const KIND: Kind;
}

impl Held for f32 {
    const KIND: Kind = Kind::Float;
}

impl Held for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

impl Held for Pair {
    const KIND: Kind = Kind::Int;
}

/// The elements of a contiguous tensor, which lives as long as this does.
pub(in crate::model) struct Span<T> {
    data: *mut T,
    len: usize,
    _tensor: Tensor,
}

// SAFETY: several threads may read at once; whoever writes says that nobody else uses the same elements.
unsafe impl<T: Held> Sync for Span<T> {}

impl<T: Held> Span<T> {
    /// # Panics
    /// If the tensor is not one that [`holds`] such elements.
    pub(in crate::model) fn of(tensor: &Tensor) -> Self {
        assert!(holds::<T>(tensor));
        Self { data: tensor.data_ptr().cast(), len: tensor.numel(), _tensor: tensor.shallow_clone() }
    }

    /// Some of the elements.
    ///
    /// # Safety
    /// Nobody writes to them while the slice lives.
    pub(in crate::model) unsafe fn read(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: within the tensor's elements; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }

    /// All of the elements.
    ///
    /// # Safety
    /// As for [`Span::read`].
    pub(in crate::model) unsafe fn all(&self) -> &[T] {
        // SAFETY: the caller's promise.
        unsafe { self.read(0..self.len) }
    }

    /// Some of the elements, to write to.
    ///
    /// # Safety
    /// Nobody else reads or writes them while the slice lives.
    #[allow(clippy::mut_from_ref)] // the threads of a loop share the span and write to parts of their own
    pub(in crate::model) unsafe fn write(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }

    /// The place of an element, the first of `rows` × `columns` whose rows begin `stride` elements apart.
    pub(super) fn place(&self, start: usize, rows: usize, columns: usize, stride: usize) -> *mut T {
        assert!(rows > 0 && columns > 0 && columns <= stride && start + (rows - 1) * stride + columns <= self.len);
        // SAFETY: within the tensor's elements, as was just checked.
        unsafe { self.data.add(start) }
    }

    /// Rows `rows` and columns `columns` of a matrix that is `width` wide and begins with the first element, to write to.
    ///
    /// # Safety
    /// Nobody else reads or writes these elements while the window lives.
    pub(super) unsafe fn window(&self, rows: Range<usize>, columns: Range<usize>, width: usize) -> Window<'_, T> {
        assert!(columns.end <= width);
        let first = self.place(rows.start * width + columns.start, rows.len(), columns.len(), width);
        // SAFETY: within the tensor's elements; the rest is the caller's promise.
        unsafe { Window::new(first, rows.len(), columns.len(), width) }
    }

    /// The same for a loop's result, [streamed](Window::streamed) where the tensor is more than a processor's second cache.
    ///
    /// # Safety
    /// As for [`Span::window`], and the thread that writes calls [`lm_kernels::finish_streams`] before its part of the loop ends.
    pub(super) unsafe fn result(&self, rows: Range<usize>, columns: Range<usize>, width: usize) -> Window<'_, T> {
        // SAFETY: the caller's promise.
        let window = unsafe { self.window(rows, columns, width) };
        // SAFETY: as above: the thread waits for its streams.
        if self.len * size_of::<T>() >= STREAMED { unsafe { window.streamed() } } else { window }
    }

    /// The same, to read.
    ///
    /// # Safety
    /// Nobody writes to these elements while the view lives.
    pub(super) unsafe fn view(&self, rows: Range<usize>, columns: Range<usize>, width: usize) -> View<'_, T> {
        assert!(columns.end <= width);
        let first = self.place(rows.start * width + columns.start, rows.len(), columns.len(), width);
        // SAFETY: as above.
        unsafe { View::new(first, rows.len(), columns.len(), width) }
    }
}

impl Span<f32> {
    /// A matrix of `rows` × `columns` from element `start` on, whose rows begin `stride` elements apart.
    pub(super) fn matrix(&self, start: usize, rows: usize, columns: usize, stride: usize) -> Matrix {
        let data = self.place(start, rows, columns, stride);
        Matrix { data, rows, columns, stride, transposed: false }
    }
}

/// A matrix that lies row by row in somebody's memory.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    data: *mut f32,
    rows: usize,
    columns: usize,
    stride: usize,
    transposed: bool,
}

impl Matrix {
    /// Of a slice, `columns` wide.
    pub(super) fn of(slice: &mut [f32], columns: usize) -> Matrix {
        let (data, rows) = (slice.as_mut_ptr(), slice.len() / columns);
        Matrix { data, rows, columns, stride: columns, transposed: false }
    }

    /// The matrix with rows and columns exchanged.
    pub(super) fn t(self) -> Matrix {
        Matrix { rows: self.columns, columns: self.rows, transposed: !self.transposed, ..self }
    }

    /// `self = factor · a · b + kept · self`.
    ///
    /// # Safety
    /// The memory of the three is alive; nobody writes to that of `a` and `b`, and nobody else uses that of `self`.
    ///
    /// # Panics
    /// If the shapes do not fit, or `self` is transposed.
    pub(super) unsafe fn product(self, factor: f32, a: Matrix, b: Matrix, kept: f32) {
        assert!(!self.transposed && (self.rows, self.columns) == (a.rows, b.columns) && a.columns == b.rows);
        let fits = |n: usize| i32::try_from(n).expect("a matrix has fewer than 2^31 rows and columns");
        let form = |matrix: Matrix| if matrix.transposed { c"T" } else { c"N" }.as_ptr();
        // BLAS thinks in columns: what lies row by row it takes for the transposed matrix, and (a·b)ᵀ is bᵀ·aᵀ.
        // SAFETY: the shapes fit each other, and were found to fit their memory when they were made.
        unsafe {
            sgemm_(
                form(b),
                form(a),
                &fits(self.columns),
                &fits(self.rows),
                &fits(a.columns),
                &factor,
                b.data,
                &fits(b.stride),
                a.data,
                &fits(a.stride),
                &kept,
                self.data,
                &fits(self.stride),
            );
        }
    }
}

unsafe extern "C" {
    /// The BLAS routine, which libtorch has from MKL: `c = alpha · op(a) · op(b) + beta · c`, column by column. Within a parallel loop of
    /// torch's it runs on the calling thread alone.
    fn sgemm_(
        transa: *const c_char,
        transb: *const c_char,
        m: *const i32,
        n: *const i32,
        k: *const i32,
        alpha: *const f32,
        a: *const f32,
        lda: *const i32,
        b: *const f32,
        ldb: *const i32,
        beta: *const f32,
        c: *mut f32,
        ldc: *const i32,
    );
}
