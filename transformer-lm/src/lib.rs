//! transformer-lm
