//! Memory that an operation reads and writes while nobody borrows it.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::dtype::Element;

/// A span of bytes with an owner that keeps it alive. Cloning and slicing share the bytes.
///
/// An operation may outlive the call that started it, so it never borrows: it holds a `Memory`. Who hands one to the
/// runtime gives up reading and writing the bytes until the operation has completed.
#[derive(Clone)]
pub struct Memory {
    ptr: NonNull<u8>,
    len: usize,
    /// Dropped with the last clone. `None` for memory whose life the creator vouches for.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: a Memory is a pointer and a length; dereferencing it is unsafe and puts the duty of exclusion on the caller.
unsafe impl Send for Memory {}
// SAFETY: as above; shared references only give out the pointer and the length.
unsafe impl Sync for Memory {}

/// A vector whose elements are reached through the pointers of a [`Memory`] only.
struct OwnedVec<T>(UnsafeCell<Vec<T>>);

// SAFETY: the vector itself is touched at creation and, once unique again, at its end; in between only its elements
// are, under the rules of `Memory`.
unsafe impl<T: Send> Sync for OwnedVec<T> {}

impl Memory {
    /// No bytes.
    pub fn empty() -> Self {
        Memory { ptr: NonNull::dangling(), len: 0, owner: None }
    }

    /// Takes over a vector; [`Memory::into_vec`] gives it back without a copy.
    pub fn from_vec<T: Element>(vec: Vec<T>) -> Self {
        let len = std::mem::size_of_val(vec.as_slice());
        let owner = Arc::new(OwnedVec(UnsafeCell::new(vec)));
        // SAFETY: nobody else knows of the vector yet.
        let ptr = unsafe { (*owner.0.get()).as_mut_ptr() };
        Memory { ptr: NonNull::new(ptr.cast()).unwrap_or(NonNull::dangling()), len, owner: Some(owner) }
    }

    /// `len` zero bytes, aligned for every element type.
    pub fn zeroed(len: usize) -> Self {
        let mut memory = Memory::from_vec(vec![0u64 as i64; len.div_ceil(8)]);
        memory.len = len;
        memory
    }

    /// Wraps memory that somebody else allocated.
    ///
    /// # Safety
    /// `ptr` must be valid for reads and writes of `len` bytes for as long as `owner` lives, or, without an owner, for
    /// as long as any clone of the result is used. Accesses must follow the rule in the type's documentation.
    pub unsafe fn from_raw_parts(ptr: NonNull<u8>, len: usize, owner: Option<Arc<dyn Any + Send + Sync>>) -> Self {
        Memory { ptr, len, owner }
    }

    /// The vector that [`Memory::from_vec`] took, if this is the last reference to it; else a copy of the bytes.
    ///
    /// # Safety
    /// No operation may still be using the bytes.
    pub unsafe fn into_vec<T: Element>(mut self) -> Vec<T> {
        let owner = self.owner.take().and_then(|owner| owner.downcast::<OwnedVec<T>>().ok());
        match owner.map(Arc::try_unwrap) {
            Some(Ok(OwnedVec(cell))) => {
                let vec = cell.into_inner();
                if size_of_val(vec.as_slice()) == self.len {
                    return vec;
                }
                // Keep the elements alive until they have been copied.
                self.owner = Some(Arc::new(OwnedVec(UnsafeCell::new(vec))));
            }
            Some(Err(shared)) => self.owner = Some(shared),
            None => {}
        }
        // SAFETY: the caller vouches that nobody writes; the bytes hold elements of some type without padding, and
        // `copy_nonoverlapping` on bytes asks for no alignment.
        unsafe {
            let count = self.len / size_of::<T>();
            let mut vec = vec![T::default(); count];
            std::ptr::copy_nonoverlapping(self.ptr.as_ptr(), vec.as_mut_ptr().cast(), count * size_of::<T>());
            vec
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the bytes are.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// A part of the bytes, sharing the owner.
    ///
    /// # Panics
    /// If `range` (in bytes) does not lie within the memory.
    pub fn slice(&self, range: Range<usize>) -> Memory {
        assert!(range.start <= range.end && range.end <= self.len, "slice {range:?} of {} bytes", self.len);
        // SAFETY: the start lies within the span, or one past its end.
        let ptr = unsafe { self.ptr.add(range.start) };
        Memory { ptr, len: range.len(), owner: self.owner.clone() }
    }

    /// The bytes, to read.
    ///
    /// # Safety
    /// Nobody may write to them while the slice is in use.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: valid for `len` bytes by construction; exclusion is the caller's duty.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// The bytes, to write.
    ///
    /// # Safety
    /// Nobody else may read or write them while the slice is in use.
    #[allow(clippy::mut_from_ref)] // Clones share the bytes by design; exclusion is the caller's duty.
    pub unsafe fn as_mut_slice(&self) -> &mut [u8] {
        // SAFETY: valid for `len` bytes by construction; exclusion is the caller's duty.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_comes_back_without_a_copy() {
        let vec = vec![1.0f32, 2.0, 3.0];
        let at = vec.as_ptr();
        let memory = Memory::from_vec(vec);
        assert_eq!(memory.len(), 12);
        // SAFETY: no operation uses the memory.
        let back: Vec<f32> = unsafe { memory.into_vec() };
        assert_eq!(back, [1.0, 2.0, 3.0]);
        assert_eq!(back.as_ptr(), at);
    }

    #[test]
    fn a_slice_or_a_shared_memory_is_copied_out() {
        let memory = Memory::from_vec(vec![1i32, 2, 3]);
        let part = memory.slice(4..12);
        // SAFETY: no operation uses the memory.
        assert_eq!(unsafe { part.into_vec::<i32>() }, [2, 3]);
        // SAFETY: as above.
        assert_eq!(unsafe { memory.slice(0..4).into_vec::<i32>() }, [1]);
    }

    #[test]
    #[should_panic(expected = "slice")]
    fn a_slice_past_the_end_is_refused() {
        Memory::zeroed(4).slice(2..5);
    }
}
