//! Operations on several tensors that are negotiated as one.

use super::handles::GroupVecHandle;
use super::process_set::{ProcessSet, borrowed, owned};
use crate::dtype::Element;
use crate::engine::submission::{Allreduce, OpKind};
use crate::error::Result;

impl ProcessSet {
    /// Combines every rank's `tensors`, which all get back, as one operation.
    ///
    /// # Errors
    /// As [`crate::Handle::wait`]; the tensors are unspecified then.
    pub fn grouped_allreduce<T: Element>(
        &self,
        name: &str,
        tensors: &mut [&mut [T]],
        options: impl Into<Allreduce>,
    ) -> Result<()> {
        let options = options.into();
        if !self.may_borrow() {
            let copies = tensors.iter().map(|tensor| tensor.to_vec()).collect();
            let results = self.grouped_allreduce_async(name, copies, options)?.wait()?;
            tensors.iter_mut().zip(results).for_each(|(tensor, result)| tensor.copy_from_slice(&result));
            return Ok(());
        }
        let submission = |(at, tensor): (usize, &mut &mut [T])| {
            // SAFETY: the tensors stay borrowed until `wait` returns, and the engine drops its memory before it completes.
            unsafe { borrowed(member(name, at), tensor, OpKind::Allreduce(options)) }
        };
        let submissions = tensors.iter_mut().enumerate().map(submission).collect();
        self.hand_in_group(name, submissions, false)?.wait().map(drop)
    }

    /// Gives all ranks everyone's `tensors`, each by rank, as one operation. Lengths may differ.
    ///
    /// # Errors
    /// As [`crate::Handle::wait`].
    pub fn grouped_allgather<T: Element>(&self, name: &str, tensors: &[&[T]]) -> Result<Vec<Vec<T>>> {
        self.grouped_allgather_async(name, copies(tensors))?.wait()
    }

    /// Combines every rank's `tensors` and gives each rank its share of each of them, as one operation; see
    /// [`ProcessSet::reducescatter`].
    ///
    /// # Errors
    /// As [`crate::Handle::wait`].
    pub fn grouped_reducescatter<T: Element>(
        &self,
        name: &str,
        tensors: &[&[T]],
        options: impl Into<Allreduce>,
    ) -> Result<Vec<Vec<T>>> {
        self.grouped_reducescatter_async(name, copies(tensors), options)?.wait()
    }

    /// As [`ProcessSet::grouped_allreduce`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit_group`].
    pub fn grouped_allreduce_async<T: Element>(
        &self,
        name: &str,
        tensors: Vec<Vec<T>>,
        options: impl Into<Allreduce>,
    ) -> Result<GroupVecHandle<T>> {
        self.run_group(name, tensors, OpKind::Allreduce(options.into()))
    }

    /// As [`ProcessSet::grouped_allgather`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit_group`].
    pub fn grouped_allgather_async<T: Element>(&self, name: &str, tensors: Vec<Vec<T>>) -> Result<GroupVecHandle<T>> {
        self.run_group(name, tensors, OpKind::Allgather)
    }

    /// As [`ProcessSet::grouped_reducescatter`], in the background.
    ///
    /// # Errors
    /// As [`ProcessSet::submit_group`].
    pub fn grouped_reducescatter_async<T: Element>(
        &self,
        name: &str,
        tensors: Vec<Vec<T>>,
        options: impl Into<Allreduce>,
    ) -> Result<GroupVecHandle<T>> {
        self.run_group(name, tensors, OpKind::Reducescatter(options.into()))
    }

    fn run_group<T: Element>(&self, name: &str, tensors: Vec<Vec<T>>, kind: OpKind) -> Result<GroupVecHandle<T>> {
        let submission = |(at, tensor)| owned(member(name, at), tensor, kind.clone());
        let submissions = tensors.into_iter().enumerate().map(submission).collect();
        self.submit_group(name, submissions).map(GroupVecHandle::new)
    }
}

/// The name of a tensor of a group.
fn member(name: &str, at: usize) -> String {
    format!("{name}.{at}")
}

fn copies<T: Element>(tensors: &[&[T]]) -> Vec<Vec<T>> {
    tensors.iter().map(|tensor| tensor.to_vec()).collect()
}
