//! What the ranks print, brought together: tagged lines on our own outputs, a file per rank and stream, the last words.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Zoned;

use super::message::Stream;

/// How many lines of a rank's stderr are kept to tell why it failed.
const LAST_WORDS: usize = 12;

/// A line longer than this is printed in pieces, in bytes.
const LONGEST_LINE: usize = 1 << 20;

/// A line that does not go on for so long is printed as it is: it may be a question.
pub const PATIENCE: Duration = Duration::from_millis(100);

/// What comes before a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// Rank and stream.
    pub tag: bool,
    /// The time.
    pub timestamp: bool,
}

/// The outputs of all ranks.
pub struct Outputs {
    prefix: Prefix,
    files: Option<Files>,
    /// Lines that have begun, by rank and stream.
    begun: HashMap<(usize, Stream), Vec<u8>>,
    /// Whose line our own output of the same name ends within.
    midline: HashMap<Stream, usize>,
    last_words: HashMap<usize, VecDeque<String>>,
}

impl Outputs {
    /// Prints with this prefix, and into files in `folder`, if there is one, for `size` ranks.
    ///
    /// # Errors
    /// If the files cannot be made.
    pub fn new(prefix: Prefix, folder: Option<&Path>, size: usize) -> Result<Outputs> {
        let files = folder.map(|folder| Files::create(folder, size)).transpose()?;
        Ok(Outputs { prefix, files, begun: HashMap::new(), midline: HashMap::new(), last_words: HashMap::new() })
    }

    /// Takes in what a rank has printed.
    ///
    /// # Errors
    /// If it cannot be written to where it belongs.
    pub fn take(&mut self, rank: usize, stream: Stream, bytes: &[u8]) -> Result<()> {
        if let Some(files) = &mut self.files {
            files.write(rank, stream, bytes)?;
        }
        let mut line = self.begun.remove(&(rank, stream)).unwrap_or_default();
        line.extend(bytes);
        let whole = line.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let rest = line.split_off(if line.len() - whole > LONGEST_LINE { line.len() } else { whole });
        if !rest.is_empty() {
            self.begun.insert((rank, stream), rest);
        }
        self.print(rank, stream, &line)
    }

    /// Whether a line has begun and not ended.
    pub fn has_begun(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Prints the lines that have begun, as far as they have got.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        let begun = std::mem::take(&mut self.begun);
        begun.into_iter().try_for_each(|((rank, stream), line)| self.print(rank, stream, &line))
    }

    /// Ends the line that our stderr is within, so that something else can be said.
    pub fn end_line(&mut self) {
        if self.midline.remove(&Stream::Stderr).is_some() {
            eprintln!();
        }
    }

    /// The last lines of a rank's stderr.
    pub fn last_words(&self, rank: usize) -> Vec<String> {
        self.last_words.get(&rank).map(|lines| lines.iter().cloned().collect()).unwrap_or_default()
    }

    fn print(&mut self, rank: usize, stream: Stream, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut text = Vec::with_capacity(bytes.len() + 32);
        let mut goes_on = match self.midline.remove(&stream) {
            Some(owner) if owner != rank => {
                text.push(b'\n');
                false
            }
            owner => owner.is_some(),
        };
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !goes_on {
                self.prefix.write(&mut text, rank, stream);
            }
            text.extend(line);
            self.remember(rank, stream, line, goes_on);
            goes_on = false;
        }
        if bytes.last() != Some(&b'\n') {
            self.midline.insert(stream, rank);
        }
        write_all(stream, &text).with_context(|| format!("cannot write to {}", stream.name()))
    }

    fn remember(&mut self, rank: usize, stream: Stream, line: &[u8], goes_on: bool) {
        if stream != Stream::Stderr {
            return;
        }
        let line = String::from_utf8_lossy(line).trim_end().to_string();
        if !goes_on && is_backtrace(&line) {
            return;
        }
        let lines = self.last_words.entry(rank).or_default();
        match lines.back_mut() {
            Some(last) if goes_on => last.push_str(&line),
            _ => lines.push_back(line),
        }
        if lines.len() > LAST_WORDS {
            lines.pop_front();
        }
    }
}

/// Whether a line is part of a backtrace as Rust prints it, which would push out what was said before.
fn is_backtrace(line: &str) -> bool {
    let text = line.trim_start();
    let is_frame = || text.split_once(": ").is_some_and(|(number, _)| number.parse::<u32>().is_ok());
    line.eq_ignore_ascii_case("stack backtrace:")
        || (text.len() < line.len() && (text.starts_with("at ") || is_frame()))
}

fn write_all(stream: Stream, text: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => io::stdout().write_all(text).and_then(|()| io::stdout().flush()),
        Stream::Stderr => io::stderr().write_all(text),
    }
}

impl Prefix {
    fn write(self, text: &mut Vec<u8>, rank: usize, stream: Stream) {
        if self.timestamp {
            text.extend(Zoned::now().strftime("%F %T%.3f ").to_string().bytes());
        }
        if self.tag {
            text.extend(format!("[{rank}]<{}>: ", stream.name()).bytes());
        }
    }
}

/// A file for each rank and stream: `DIR/rank.N/stdout`, `DIR/rank.N/stderr`.
struct Files(HashMap<(usize, Stream), (PathBuf, File)>);

impl Files {
    fn create(folder: &Path, size: usize) -> Result<Files> {
        let width = (size - 1).to_string().len();
        let mut files = HashMap::new();
        for rank in 0..size {
            let folder = folder.join(format!("rank.{rank:0width$}"));
            std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            for stream in [Stream::Stdout, Stream::Stderr] {
                let path = folder.join(stream.name());
                let file = File::create(&path).with_context(|| format!("cannot make the file {}", path.display()))?;
                files.insert((rank, stream), (path, file));
            }
        }
        Ok(Files(files))
    }

    fn write(&mut self, rank: usize, stream: Stream, bytes: &[u8]) -> Result<()> {
        let Some((path, file)) = self.0.get_mut(&(rank, stream)) else { return Ok(()) };
        file.write_all(bytes).with_context(|| format!("cannot write to {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backtraces_do_not_push_out_what_was_said() {
        let mut outputs = Outputs::new(Prefix::default(), None, 1).unwrap();
        let frames = (0..20).map(|at| format!("  {at:2}: main::frame\n             at ./src/main.rs:{at}\n"));
        let text = format!("Error: lost rank 2: gone\n\nStack backtrace:\n{}", frames.collect::<String>());
        outputs.take(0, Stream::Stderr, text.as_bytes()).unwrap();
        assert_eq!(outputs.last_words(0), ["Error: lost rank 2: gone", ""]);
    }
}
