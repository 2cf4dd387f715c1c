//! Standard output, which may be closed or full: `println!` would panic.

use std::io::{ErrorKind, Write, stdout};
use std::path::Path;

use crate::{Error, Result};

/// What errors call it.
const NAME: &str = "standard output";

/// Prints a text and flushes.
///
/// # Errors
/// Where it cannot be written; [`has_no_reader`] tells whether anybody wants to know.
pub(crate) fn say(text: &str) -> Result<()> {
    say_to(&mut stdout().lock(), text)
}

/// As [`say`], on what stands for standard output. Flushes, so that text appears as it is drawn.
pub(crate) fn say_to(out: &mut dyn Write, text: &str) -> Result<()> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", NAME))
}

/// Whether it was standard output that could not be written.
pub(crate) fn is_of_stdout(error: &Error) -> bool {
    matches!(error, Error::Io { path, .. } if path == Path::new(NAME))
}

/// Whether whoever read standard output has gone, as `head` does: no failure of the program's.
pub(crate) fn has_no_reader(error: &Error) -> bool {
    is_of_stdout(error) && matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::BrokenPipe)
}
