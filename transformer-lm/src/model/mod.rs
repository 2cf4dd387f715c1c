//! The decoder-only transformer.
