//! What this build can do on this machine.

use crate::transport::mpi;

/// One thing that a build may or may not be able to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its name, as `hvdrun --check-build` prints it.
    pub name: &'static str,
    /// Whether it is there.
    pub available: bool,
    /// What was found, or why it is not there.
    pub detail: String,
}

/// Every capability, whether it is there or not.
pub fn capabilities() -> Vec<Capability> {
    let (mpi_available, mpi_detail) = match mpi::library() {
        Ok(version) => (true, version),
        Err(error) => (false, error.to_string()),
    };
    let there = |name, available, detail: &str| Capability { name, available, detail: detail.into() };
    vec![
        there("shm", shm_built(), "memory that the ranks of one host share (memfd)"),
        there("tcp", tcp_built(), "built in"),
        Capability { name: "mpi", available: mpi_available, detail: mpi_detail },
        there("cuda", cuda_built(), "tensors on GPUs are staged on the CPU"),
        there("nccl", nccl_built(), "not used"),
        there("rocm", rocm_built(), "not used"),
        there("gloo", gloo_built(), "not used: tcp takes its place"),
        there("ccl", ccl_built(), "not used"),
        there("ddl", ddl_built(), "not used"),
    ]
}

/// Whether ranks of one host can share memory.
pub fn shm_built() -> bool {
    rustix::fs::memfd_create("hvd-probe", rustix::fs::MemfdFlags::CLOEXEC).is_ok()
}

/// Whether ranks can talk over TCP: always.
pub fn tcp_built() -> bool {
    true
}

/// Whether the MPI plugin and its MPI are there. Loads them, but does not start MPI.
pub fn mpi_built() -> bool {
    mpi::library().is_ok()
}

/// Whether buffers on GPUs are reduced there.
pub fn cuda_built() -> bool {
    false
}

/// Whether NCCL is used.
pub fn nccl_built() -> bool {
    false
}

/// Whether buffers on AMD's GPUs are reduced there.
pub fn rocm_built() -> bool {
    false
}

/// Whether Gloo is used: never, as TCP takes its place; see [`tcp_built`].
pub fn gloo_built() -> bool {
    false
}

/// Whether Gloo moves bytes between the ranks: never. Whether TCP does, which takes its place, says
/// [`tcp_enabled`](crate::tcp_enabled).
pub fn gloo_enabled() -> bool {
    gloo_built()
}

/// Whether oneCCL is used.
pub fn ccl_built() -> bool {
    false
}

/// Whether IBM's DDL is used.
pub fn ddl_built() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_says_what_the_queries_say() {
        let queries = [
            ("shm", shm_built as fn() -> bool),
            ("tcp", tcp_built),
            ("mpi", mpi_built),
            ("cuda", cuda_built),
            ("nccl", nccl_built),
            ("rocm", rocm_built),
            ("gloo", gloo_enabled),
            ("ccl", ccl_built),
            ("ddl", ddl_built),
        ];
        let listed: Vec<_> = capabilities().into_iter().map(|found| (found.name, found.available)).collect();
        assert_eq!(listed, queries.map(|(name, query)| (name, query())));
    }
}
