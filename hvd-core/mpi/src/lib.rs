//! The MPI plugin.
