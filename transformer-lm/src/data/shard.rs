//! Token shards as files; [`lm_formats::shard`] describes their bytes.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::Tokenizer;
use crate::{Error, Result};

pub use lm_formats::shard::{HEADER_BYTES, Header};

/// Shards up to this size have their checksum verified when they are opened (a fraction of a second).
const VERIFIED_AT_OPEN_BYTES: usize = 256 << 20;

/// An open shard, mapped into memory.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    header: Header,
    map: Mmap,
}

impl Shard {
    /// Opens and checks a shard; the tokens' checksum too, unless the file is large ([`Shard::verify`] always does).
    ///
    /// # Errors
    /// A file that is missing, truncated, damaged or no shard.
    pub fn open(path: &Path) -> Result<Self> {
        // Asked before it is opened: opening a pipe waits for somebody to write.
        if !std::fs::metadata(path).map_err(Error::io("read", path))?.is_file() {
            return Err(Error::data(path, "not a file"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is read-only and bytes read through it are checked as untrusted values. That nobody shortens
        // the file meanwhile is the user's part; `lm prepare` replaces shards by renaming and never writes into one.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let header = Header::decode(&map).map_err(|malformed| Error::data(path, malformed.to_string()))?;
        let shard = Self { path: path.into(), header, map };
        if shard.map.len() <= VERIFIED_AT_OPEN_BYTES {
            shard.verify()?;
        }
        Ok(shard)
    }

    /// What it says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads everything and compares the checksum.
    pub fn verify(&self) -> Result<()> {
        self.header.verify(&self.map).map_err(|malformed| Error::data(&self.path, malformed.to_string()))
    }

    /// Appends `len` tokens from `start` on to `tokens`.
    ///
    /// # Errors
    /// Tokens that lie outside the shard or outside the vocabulary.
    pub fn read(&self, start: u64, len: usize, tokens: &mut Vec<i64>) -> Result<()> {
        let read = self.header.read(&self.map, start, len, tokens);
        read.map_err(|malformed| Error::data(&self.path, malformed.to_string()))
    }
}

/// Writes a shard token by token. The file is nothing until [`ShardWriter::finish`] has written its header.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
    header: Header,
    checksum: crc32fast::Hasher,
}

impl ShardWriter {
    /// Starts a file, which must not exist. `before` is the checksum of the shard before it in its part, 0 for the first.
    pub fn create(path: &Path, tokenizer: &Tokenizer, before: u32) -> Result<Self> {
        let vocab_size = tokenizer.vocab_size();
        let token_bytes = if vocab_size <= 1 << 16 { 2 } else { 4 };
        let tokenizer = tokenizer.name().to_owned();
        let header = Header { token_bytes, vocab_size, tokens: 0, checksum: 0, tokenizer, before };
        let mut file = BufWriter::new(File::create_new(path).map_err(Error::io("create", path))?);
        file.write_all(&[0; HEADER_BYTES]).map_err(Error::io("write", path))?;
        Ok(Self { path: path.into(), file, header, checksum: crc32fast::Hasher::new() })
    }

    /// Appends tokens, each below the vocabulary size.
    pub fn write(&mut self, tokens: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = match self.header.token_bytes {
            2 => tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect(),
            _ => tokens.iter().flat_map(|&token| token.to_le_bytes()).collect(),
        };
        self.checksum.update(&bytes);
        self.header.tokens += tokens.len() as u64;
        self.file.write_all(&bytes).map_err(Error::io("write", &self.path))
    }

    /// Writes the header and makes all durable; gives the checksum of the tokens.
    pub fn finish(mut self) -> Result<u32> {
        self.header.checksum = self.checksum.finalize();
        let header = self.header.encode();
        let file = &mut self.file;
        let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header)).and_then(|()| file.flush());
        written.and_then(|()| self.file.get_ref().sync_all()).map_err(Error::io("write", &self.path))?;
        Ok(self.header.checksum)
    }
}
