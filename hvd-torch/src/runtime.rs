//! What this crate uses of the runtime.

pub(crate) use crate::standin::{Allreduce, Handle, OpKind, Output, Submission, World, world};
