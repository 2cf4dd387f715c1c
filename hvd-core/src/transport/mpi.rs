//! The plugin transport over MPI.
