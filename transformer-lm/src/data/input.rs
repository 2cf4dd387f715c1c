//! The text that `prepare` reads: files, folders and patterns, in pieces that fit into memory.
//!
//! A `.jsonl` file holds a document on each line, an object one of whose fields is the text. Every other file is one document.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Result};

/// A piece is about this long. Small enough for many in memory, large enough to be worth a thread's while.
const PIECE_BYTES: usize = 1 << 20;

/// A text is cut in front of white space; one without any for so long is cut between characters.
const LONGEST_WORD_BYTES: usize = 16 << 20;

/// No single line of a `.jsonl` file may be longer.
const LONGEST_LINE_BYTES: usize = 1 << 30;

/// How a file holds documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The file is one document.
    Text,
    /// Each line is a JSON object with a document in one of its fields.
    Lines,
}

impl Format {
    fn of(path: &Path) -> Format {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl" | "ndjson") => Format::Lines,
            _ => Format::Text,
        }
    }
}

/// A part of a file that can be turned into tokens on its own.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// The file.
    pub path: Arc<Path>,
    /// How it holds documents.
    pub format: Format,
    /// Where the piece begins: its first byte, or its first line, counted from 0.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether the file ends here.
    pub last: bool,
}

/// The files that `inputs` mean: a file itself, of a folder all `.txt` and `.jsonl` files below it, of a pattern (`*`, `?`,
/// `[…]`, `**`) the files that match. Sorted by name, then by path; each once.
///
/// # Errors
/// An input that is nothing of these or means no file.
pub(super) fn find_files(inputs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for input in inputs {
        let before = files.len();
        match std::fs::metadata(input) {
            Ok(metadata) if metadata.is_dir() => walk(input, &mut files)?,
            Ok(metadata) if metadata.is_file() => files.push(input.clone()),
            Ok(_) => return Err(Error::data(input, "neither a file nor a folder; give text files")),
            Err(error) => matching(input, &mut files)?.ok_or_else(|| Error::io("read", input)(error))?,
        }
        if files.len() == before {
            return Err(Error::data(input, "no text file here; expected .txt or .jsonl files"));
        }
    }
    files.sort_by(|a, b| (a.file_name(), a).cmp(&(b.file_name(), b)));
    files.dedup();
    Ok(files)
}

/// All texts below a folder. Links are not followed to folders, so there are no loops.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let path = entry.path();
        if entry.file_type().map_err(Error::io("read", &path))?.is_dir() {
            walk(&path, files)?;
        } else if is_text(&path) && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn is_text(path: &Path) -> bool {
    path.extension().and_then(|extension| extension.to_str()).is_some_and(|e| matches!(e, "txt" | "jsonl" | "ndjson"))
}

/// The files that match a pattern; none where `pattern` is no pattern.
fn matching(pattern: &Path, files: &mut Vec<PathBuf>) -> Result<Option<()>> {
    let Some(text) = pattern.to_str().filter(|text| text.contains(['*', '?', '['])) else { return Ok(None) };
    let paths = glob::glob(text).map_err(|error| Error::data(pattern, format!("not a pattern: {error}")))?;
    for path in paths {
        let path = path.map_err(|error| Error::io("read", error.path().to_path_buf())(error.into()))?;
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(Some(()))
}

/// Reads files piece by piece. Ends after an error.
#[derive(Debug)]
pub(super) struct Pieces {
    files: std::vec::IntoIter<PathBuf>,
    open: Option<Open>,
}

/// The file that is being read.
#[derive(Debug)]
struct Open {
    path: Arc<Path>,
    format: Format,
    file: File,
    /// Read but not given out.
    held: Vec<u8>,
    at: u64,
}

impl Pieces {
    /// Reads these files in this order.
    pub(super) fn new(files: Vec<PathBuf>) -> Self {
        Self { files: files.into_iter(), open: None }
    }

    fn piece(&mut self) -> Result<Option<Piece>> {
        loop {
            if self.open.is_none() {
                let Some(path) = self.files.next() else { return Ok(None) };
                self.open = Some(Open::new(path)?);
            }
            let Some(open) = &mut self.open else { return Ok(None) };
            let piece = open.piece()?;
            if piece.last {
                self.open = None;
            }
            // The end of a document may have nothing before it, but an empty file is no document.
            if !piece.bytes.is_empty() || (piece.last && piece.at > 0) {
                return Ok(Some(piece));
            }
        }
    }
}

impl Iterator for Pieces {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.piece();
        if piece.is_err() {
            (self.files, self.open) = (Vec::new().into_iter(), None);
        }
        piece.transpose()
    }
}

impl Open {
    fn new(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io("read", &path))?;
        Ok(Self { format: Format::of(&path), path: path.into(), file, held: Vec::new(), at: 0 })
    }

    fn piece(&mut self) -> Result<Piece> {
        loop {
            let before = self.held.len();
            let mut part = self.file.by_ref().take(PIECE_BYTES as u64);
            part.read_to_end(&mut self.held).map_err(Error::io("read", &self.path))?;
            let last = self.held.len() < before + PIECE_BYTES;
            let end = if last { Some(self.held.len()) } else { self.cut()? };
            if let Some(end) = end {
                let rest = self.held.split_off(end);
                let bytes = std::mem::replace(&mut self.held, rest);
                let at = self.at;
                self.at += match self.format {
                    Format::Text => bytes.len() as u64,
                    Format::Lines => bytes.iter().filter(|byte| **byte == b'\n').count() as u64,
                };
                return Ok(Piece { path: Arc::clone(&self.path), format: self.format, at, bytes, last });
            }
        }
    }

    /// Where a piece may end; none if more has to be read first.
    fn cut(&self) -> Result<Option<usize>> {
        let held = &self.held;
        match self.format {
            Format::Text if held.len() > LONGEST_WORD_BYTES => Ok(Some(before_space(held).unwrap_or(whole(held)))),
            Format::Text => Ok(before_space(held)),
            Format::Lines if held.len() > LONGEST_LINE_BYTES && !held.contains(&b'\n') => {
                Err(Error::data(&self.path, format!("line {} is longer than 1 GiB", self.at + 1)))
            }
            Format::Lines => Ok(held.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1)),
        }
    }
}

/// The last place where white space begins. GPT-2's pattern always starts a new word there, and what comes before does
/// not depend on what comes after, so cutting there changes no token.
fn before_space(bytes: &[u8]) -> Option<usize> {
    (1..bytes.len()).rev().find(|&at| is_space(bytes[at]) && !ends_in_space(&bytes[..at]))
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

fn ends_in_space(bytes: &[u8]) -> bool {
    let last = std::str::from_utf8(&bytes[last_character(bytes)..]).ok().and_then(|text| text.chars().next());
    last.is_some_and(char::is_whitespace)
}

/// Where the last, perhaps incomplete, character begins.
fn last_character(bytes: &[u8]) -> usize {
    let is_start = |at: &usize| bytes[*at] & 0xC0 != 0x80;
    (bytes.len().saturating_sub(4)..bytes.len()).rev().find(is_start).unwrap_or(bytes.len())
}

/// The length of the part that ends with a whole character.
fn whole(bytes: &[u8]) -> usize {
    let last = last_character(bytes);
    let is_cut = std::str::from_utf8(&bytes[last..]).is_err_and(|error| error.error_len().is_none());
    if is_cut { last } else { bytes.len() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Tokenizer;
    use proptest::prelude::*;

    #[test]
    fn pieces_together_are_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.txt");
        let text = "naïve words 語 \u{3000}\n\n and more of them\t\n".repeat(100_000);
        std::fs::write(&path, &text).unwrap();
        let pieces: Vec<Piece> = Pieces::new(vec![path]).map(Result::unwrap).collect();
        assert!(pieces.len() > 3 && pieces.iter().all(|piece| std::str::from_utf8(&piece.bytes).is_ok()));
        let mut joined = Vec::new();
        for piece in &pieces {
            assert_eq!(piece.at as usize, joined.len());
            joined.extend_from_slice(&piece.bytes);
        }
        assert!(joined == text.as_bytes());
        assert_eq!(pieces.iter().filter(|piece| piece.last).count(), 1);
    }

    #[test]
    fn a_text_without_space_is_cut_between_characters() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.txt");
        std::fs::write(&path, "語".repeat(12 << 20)).unwrap();
        let pieces: Vec<Piece> = Pieces::new(vec![path]).map(Result::unwrap).collect();
        assert!(pieces.len() > 1 && pieces.iter().all(|piece| std::str::from_utf8(&piece.bytes).is_ok()));
    }

    proptest! {
        /// What a cut is for: the tokens of the parts are the tokens of the whole.
        #[test]
        fn a_cut_changes_no_token(text in "([a-z']{0,5}|[ \n\t]{0,3}|[0-9]|[\u{3000}\u{a0}é語]|[.!-]){0,30}") {
            if let Some(at) = before_space(text.as_bytes()) {
                let mut parts = Tokenizer::Gpt2.encode(&text[..at]).unwrap();
                parts.extend(Tokenizer::Gpt2.encode(&text[at..]).unwrap());
                prop_assert_eq!(parts, Tokenizer::Gpt2.encode(&text).unwrap());
            }
        }
    }

    #[test]
    fn folders_and_patterns_stand_for_their_texts() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(path("deep/er")).unwrap();
        for name in ["b.txt", "deep/a.txt", "deep/er/c.jsonl", "picture.png", "plain"] {
            std::fs::write(path(name), "x").unwrap();
        }
        let names = |inputs: &[&str]| -> Vec<String> {
            let inputs: Vec<PathBuf> = inputs.iter().map(|input| path(input)).collect();
            let files = find_files(&inputs).unwrap();
            files.iter().map(|file| file.strip_prefix(folder.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(&[""]), ["deep/a.txt", "b.txt", "deep/er/c.jsonl"]);
        assert_eq!(names(&["*.txt", "plain", "b.txt"]), ["b.txt", "plain"]);
        assert_eq!(names(&["**/*.txt"]), ["deep/a.txt", "b.txt"]);
        for (input, message) in [("none", "cannot read"), ("*.xml", "no text file here"), ("[", "not a pattern")] {
            assert!(find_files(&[path(input)]).unwrap_err().to_string().contains(message), "{input}");
        }
    }
}
