//! The run folder: metrics, TensorBoard files, the progress line.
