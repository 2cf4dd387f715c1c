//! Command-line tools on hvd-core. The binaries only parse arguments and call this library.
#![deny(missing_docs)]

pub mod perf;
pub mod run;
