//! Ranks that are threads of one process: tests and simulations at any world size.
