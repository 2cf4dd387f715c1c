//! Conversion between what users hold and what travels.

mod convert;
pub(crate) mod lane;
pub(crate) mod sixteen;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

pub(crate) use convert::finish;
pub use convert::{convert, scale};
pub use sixteen::{narrow_bf16, widen_bf16};

/// What f32 and f64 elements are narrowed to while they travel. Other dtypes travel as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Nothing: every bit travels.
    #[default]
    None,
    /// IEEE 754 binary16: 11 bits of precision, up to 65504.
    Fp16,
    /// bfloat16: 8 bits of precision, the range of f32.
    Bf16,
}

impl Compression {
    /// The element type on the wire for a buffer of `dtype`.
    pub const fn wire_dtype(self, dtype: DType) -> DType {
        match (self, dtype) {
            (Compression::Fp16, DType::F32 | DType::F64) => DType::F16,
            (Compression::Bf16, DType::F32 | DType::F64) => DType::BF16,
            _ => dtype,
        }
    }
}
