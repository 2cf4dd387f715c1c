//! What users get wrong, with the message they get: broken configurations, arguments, data folders and checkpoints, given to the
//! built binaries. Each is refused with the exit code that the README promises and leaves every file as it was.

mod arguments;
mod checkpoints;
mod configurations;
mod data;
mod full_disk;
mod lab;
#[path = "../../../tests/src/skipped.rs"]
mod skipped;
mod standard_output;
