//! CUDA at run time: one binary for machines with and without.

use crate::shim;

/// What [`load_cuda`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaStatus {
    /// CUDA can be used, on so many devices.
    Ready {
        /// Number of devices.
        devices: usize,
    },
    /// libtorch's CUDA library is there, a device or its driver is not.
    NoDevice,
    /// There is no CUDA library of libtorch on the library path; the system's reason. CPU training works as always.
    NotInstalled(String),
}

impl std::fmt::Display for CudaStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CudaStatus::Ready { devices } => write!(f, "CUDA with {devices} device(s)"),
            CudaStatus::NoDevice => f.write_str("CUDA is installed, but there is no device that it can use"),
            CudaStatus::NotInstalled(reason) => write!(f, "no CUDA: {reason}"),
        }
    }
}

/// Loads libtorch's CUDA library if there is one. Must be the first statement of `main`.
///
/// We link the CPU library alone. For CUDA, the `lib` folder of a full libtorch 2.11 must be on LD_LIBRARY_PATH. Asking
/// torch about CUDA, seeding it, or a backward pass before this call would lose CUDA for the whole process.
pub fn load_cuda() -> CudaStatus {
    if let Err(reason) = shim::dlopen("libtorch_cuda.so") {
        return CudaStatus::NotInstalled(reason);
    }
    match tch::Cuda::device_count() {
        devices if devices > 0 && tch::Cuda::is_available() => CudaStatus::Ready { devices: devices as usize },
        _ => CudaStatus::NoDevice,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_no_failure() {
        let reason = shim::dlopen("libhvd_that_does_not_exist.so").unwrap_err();
        assert!(reason.contains("libhvd_that_does_not_exist.so"), "{reason}");
    }
}
