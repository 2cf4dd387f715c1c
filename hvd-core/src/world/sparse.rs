//! Allreduce of tensors of which each rank has some rows.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use super::process_set::{ProcessSet, owned};
use crate::dtype::Element;
use crate::engine::GroupHandle;
use crate::engine::submission::{OpKind, Submission};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::reduce::{ReduceOp, Reduction, combine, finish};

/// A sparse allreduce under way. Dropping it does not cancel the operation.
#[must_use = "the result is there only after `wait`"]
pub struct SparseHandle<T> {
    handle: GroupHandle,
    width: usize,
    op: ReduceOp,
    elements: PhantomData<T>,
}

impl<T: Element> SparseHandle<T> {
    /// Whether the operation is done. Never blocks.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for the operation; indices, ascending, and their rows.
    ///
    /// # Errors
    /// As [`crate::Handle::wait`].
    pub fn wait(self) -> Result<(Vec<i64>, Vec<T>)> {
        let [indices, values, ranks] = three(self.handle.wait()?)?;
        // SAFETY: the operations are done.
        let (indices, values) = unsafe { (indices.into_vec::<i64>(), values.into_vec::<T>()) };
        Ok(sum_rows(&indices, values, self.width, self.op, ranks.len()))
    }
}

impl ProcessSet {
    /// Sums or averages rows that each rank has of a large tensor: all ranks get the combined rows, by ascending index.
    ///
    /// `values` holds one row of `width` elements for each of `indices`; an index may come more than once, and indices and
    /// their number may differ from rank to rank. An average is over all ranks of the set, those without the row included;
    /// not over those that have joined. Indices and values travel as one group of allgathers, so every rank receives what all
    /// ranks have; rows are summed in the order of ranks: all ranks get the same bits.
    ///
    /// # Errors
    /// [`Error::Invalid`] where lengths do not fit or the operation is neither Sum nor Average, else as
    /// [`crate::Handle::wait`].
    pub fn sparse_allreduce<T: Element>(
        &self,
        name: &str,
        indices: &[i64],
        values: &[T],
        width: usize,
        op: ReduceOp,
    ) -> Result<(Vec<i64>, Vec<T>)> {
        self.sparse_allreduce_async(name, indices, values, width, op)?.wait()
    }

    /// As [`ProcessSet::sparse_allreduce`], in the background.
    ///
    /// # Errors
    /// [`Error::Invalid`] as there. What goes wrong later is the handle's to tell.
    pub fn sparse_allreduce_async<T: Element>(
        &self,
        name: &str,
        indices: &[i64],
        values: &[T],
        width: usize,
        op: ReduceOp,
    ) -> Result<SparseHandle<T>> {
        check::<T>(indices, values, width, op).map_err(|detail| Error::Invalid(format!("`{name}`: {detail}")))?;
        let values = Submission {
            shape: vec![indices.len(), width],
            ..owned(format!("{name}.values"), values.to_vec(), OpKind::Allgather)
        };
        let indices = owned(format!("{name}.indices"), indices.to_vec(), OpKind::Allgather);
        // A byte of each rank that has not joined: a rank without rows counts, too.
        let ranks = owned(format!("{name}.ranks"), vec![0u8], OpKind::Allgather);
        let handle = self.submit_group(name, vec![indices, values, ranks])?;
        Ok(SparseHandle { handle, width, op, elements: PhantomData })
    }
}

fn check<T: Element>(indices: &[i64], values: &[T], width: usize, op: ReduceOp) -> std::result::Result<(), String> {
    if indices.len().checked_mul(width) != Some(values.len()) {
        return Err(format!("{} values for {} rows of {width}", values.len(), indices.len()));
    }
    if !matches!(op, ReduceOp::Sum | ReduceOp::Average) || !op.supports(T::DTYPE) {
        return Err(format!("{op:?} of sparse {} is not defined; use Sum or Average", T::DTYPE));
    }
    Ok(())
}

fn three(completions: Vec<crate::engine::submission::Completion>) -> Result<[Memory; 3]> {
    let outputs: Vec<_> = completions.into_iter().map(|completion| completion.output).collect();
    outputs.try_into().map_err(|_| Error::Invalid("a group of three gave another number of results".into()))
}

/// Adds up the rows of each index, in the order in which they come.
fn sum_rows<T: Element>(
    indices: &[i64],
    values: Vec<T>,
    width: usize,
    op: ReduceOp,
    ranks: usize,
) -> (Vec<i64>, Vec<T>) {
    let row_bytes = width * size_of::<T>();
    let memory = Memory::from_vec(values);
    // SAFETY: nobody else knows of the memory.
    let bytes = unsafe { memory.as_slice() };
    let mut rows: BTreeMap<i64, Vec<&[u8]>> = BTreeMap::new();
    for (at, &index) in indices.iter().enumerate() {
        rows.entry(index).or_default().push(&bytes[at * row_bytes..(at + 1) * row_bytes]);
    }
    let sums = Memory::from_vec(vec![T::default(); rows.len() * width]);
    // SAFETY: as above.
    let out = unsafe { sums.as_mut_slice() };
    let scale = if op == ReduceOp::Average && T::DTYPE.is_float() { 1.0 / ranks as f64 } else { 1.0 };
    for (rows, out) in rows.values().zip(out.chunks_mut(row_bytes.max(1))) {
        combine(ReduceOp::Sum, T::DTYPE, out, rows, scale);
    }
    if op == ReduceOp::Average && !T::DTYPE.is_float() {
        finish(&Reduction::new(T::DTYPE, ReduceOp::Average), ranks, out);
    }
    // SAFETY: as above.
    (rows.into_keys().collect(), unsafe { sums.into_vec() })
}
