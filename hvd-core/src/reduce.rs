//! Kernels that combine elements.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// How the ranks' elements are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The sum divided by the number of ranks; integers floor.
    Average,
    /// The least.
    Min,
    /// The greatest.
    Max,
    /// The product.
    Product,
}

impl ReduceOp {
    /// Whether the operation is defined for elements of `dtype`: everything for 16-bit floats and up and 32-bit
    /// integers and up; sum, min and max for the small integers; min (and) and max (or) for bool.
    pub const fn supports(self, dtype: DType) -> bool {
        match dtype {
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 | DType::I32 | DType::I64 => true,
            DType::U8 | DType::I8 | DType::I16 => matches!(self, ReduceOp::Sum | ReduceOp::Min | ReduceOp::Max),
            DType::Bool => matches!(self, ReduceOp::Min | ReduceOp::Max),
        }
    }
}
