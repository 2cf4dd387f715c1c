//! From pieces of text to tokens, on all cores.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use indicatif::ProgressBar;
use serde_json::Value;

use super::Tokenizer;
use super::input::{Format, Piece, Pieces};
use super::ordered::Ordered;
use crate::{Error, Result};

/// Pieces that may wait for the writer, for each thread.
const AHEAD: usize = 4;

/// What has to be known of a piece to take documents out of it.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    /// The field of a `.jsonl` file's objects that holds the text.
    pub field: String,
    /// Whether text must be UTF-8: all but `byte` tokenizers work on characters.
    pub utf8: bool,
    /// Whether a document without a line break at its end gets one if another follows: where no end token tells them apart.
    pub line_breaks: bool,
}

/// A document, or the part of one that lies in a piece.
#[derive(Debug)]
pub(super) struct Part {
    /// The bytes; UTF-8 where the reader asks for it.
    pub text: Vec<u8>,
    /// Whether the document ends here.
    pub ends: bool,
}

impl Reader {
    /// The documents in a piece.
    ///
    /// # Errors
    /// Text that is no UTF-8, lines that are not JSON or lack the field; the error names the place.
    pub(super) fn parts(&self, piece: Piece) -> Result<Vec<Part>> {
        let mut parts = match piece.format {
            Format::Text => vec![Part { ends: piece.last, text: self.checked(piece)? }],
            Format::Lines => self.lines(&piece)?,
        };
        if let Some((_, followed)) = parts.split_last_mut() {
            let lacking = followed.iter_mut().filter(|part| self.owes_break(part));
            lacking.for_each(|part| part.text.push(b'\n'));
        }
        Ok(parts)
    }

    /// Whether a line break has to come before the next document.
    fn owes_break(&self, part: &Part) -> bool {
        self.line_breaks && part.ends && !part.text.ends_with(b"\n")
    }

    fn checked(&self, piece: Piece) -> Result<Vec<u8>> {
        match std::str::from_utf8(&piece.bytes) {
            Err(error) if self.utf8 => {
                let at = piece.at + error.valid_up_to() as u64;
                let hint = "convert it, or use --tokenizer byte, which takes any bytes";
                Err(Error::data(&piece.path, format!("no UTF-8 at byte {at}; {hint}")))
            }
            _ => Ok(piece.bytes),
        }
    }

    fn lines(&self, piece: &Piece) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for (line, number) in piece.bytes.split(|byte| *byte == b'\n').zip(piece.at + 1..) {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let text =
                self.field_of(line).map_err(|detail| Error::data(&piece.path, format!("line {number}: {detail}")))?;
            if !text.is_empty() {
                parts.push(Part { text: text.into_bytes(), ends: true });
            }
        }
        Ok(parts)
    }

    fn field_of(&self, line: &[u8]) -> std::result::Result<String, String> {
        let field = &self.field;
        let value: Value = serde_json::from_slice(line).map_err(|error| format!("not JSON: {error}"))?;
        let Value::Object(mut object) = value else { return Err("not a JSON object".into()) };
        match object.remove(field) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(format!("its field `{field}` is {other}, expected a text")),
            None => {
                let known: Vec<&String> = object.keys().collect();
                Err(format!("no field `{field}` among {known:?}; name it by --field"))
            }
        }
    }
}

/// A piece as tokens.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    /// The tokens, end tokens included.
    pub tokens: Vec<u32>,
    /// Documents that end in the piece.
    pub documents: u64,
    /// CRC-32 of the documents' bytes; that of several pieces can be put together.
    pub checksum: crc32fast::Hasher,
    /// Whether a line break has to come before the next piece.
    pub owes_break: bool,
}

/// The tokens of all files, piece by piece, in order. `bar` counts bytes that were read.
pub(super) fn encode(
    files: Vec<PathBuf>,
    reader: Reader,
    tokenizer: Tokenizer,
    threads: usize,
    bar: ProgressBar,
) -> impl Iterator<Item = Result<Encoded>> {
    over_pieces(files, threads, bar, move |piece| encode_parts(&tokenizer, &reader, reader.parts(piece)?))
}

fn encode_parts(tokenizer: &Tokenizer, reader: &Reader, parts: Vec<Part>) -> Result<Encoded> {
    let owes_break = parts.last().is_some_and(|part| reader.owes_break(part));
    let mut encoded = Encoded { owes_break, ..Encoded::default() };
    for part in parts {
        encoded.checksum.update(&part.text);
        match tokenizer {
            Tokenizer::Byte => encoded.tokens.extend(part.text.into_iter().map(u32::from)),
            _ => encoded.tokens.extend(tokenizer.encode(&String::from_utf8_lossy(&part.text))?),
        }
        if part.ends {
            encoded.documents += 1;
            encoded.tokens.extend(tokenizer.end_token());
        }
    }
    Ok(encoded)
}

/// The characters that the tokens of the files will need.
pub(super) fn characters(
    files: Vec<PathBuf>,
    reader: Reader,
    threads: usize,
    bar: ProgressBar,
) -> Result<BTreeSet<char>> {
    let of_piece = move |piece| {
        let parts = reader.parts(piece)?;
        let characters = parts.iter().flat_map(|part| String::from_utf8_lossy(&part.text).chars().collect::<Vec<_>>());
        Ok((characters.collect::<BTreeSet<char>>(), parts.last().is_some_and(|part| reader.owes_break(part))))
    };
    let (mut all, mut owed) = (BTreeSet::new(), false);
    for piece in over_pieces(files, threads, bar, of_piece) {
        let (characters, owes_break) = piece?;
        if !characters.is_empty() {
            all.extend(characters.into_iter().chain(owed.then_some('\n')));
            owed = owes_break;
        }
    }
    Ok(all)
}

/// The texts of every `stride`-th piece.
pub(super) fn sample(
    files: Vec<PathBuf>,
    reader: Reader,
    stride: usize,
    bar: ProgressBar,
) -> impl Iterator<Item = Result<Vec<String>>> {
    let text = |part: Part| String::from_utf8_lossy(&part.text).into_owned();
    let texts = move |piece| Ok(reader.parts(piece)?.into_iter().map(text).collect());
    let counted = move |piece: Result<Piece>| count(&bar, piece);
    Pieces::new(files).step_by(stride.max(1)).map(counted).map(move |piece| texts(piece?))
}

fn over_pieces<R: Send + 'static>(
    files: Vec<PathBuf>,
    threads: usize,
    bar: ProgressBar,
    work: impl Fn(Piece) -> Result<R> + Send + Sync + 'static,
) -> Ordered<Result<R>> {
    let bar = Arc::new(bar);
    Ordered::new(threads, AHEAD * threads.max(1), Pieces::new(files), move |piece| work(count(&bar, piece)?))
}

fn count(bar: &ProgressBar, piece: Result<Piece>) -> Result<Piece> {
    piece.inspect(|piece| bar.inc(piece.bytes.len() as u64))
}
