//! Where the elements of a tensor lie.

use serde::{Deserialize, Serialize};

/// The kind of memory that holds a tensor. All ranks must hold a tensor in the same kind; which of its devices is each
/// rank's own business.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Device {
    /// Memory of the host.
    #[default]
    Cpu,
    /// Memory of a CUDA device. No backend serves it yet: once all ranks have submitted such a tensor, it is refused on
    /// all of them.
    Cuda,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        })
    }
}
