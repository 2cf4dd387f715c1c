//! Ranks of one host reduce through shared memory.
