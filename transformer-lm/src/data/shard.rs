//! Token shards: files of tokens, 16 or 32 bits each, behind a header.
//!
//! | bytes | content |
//! |---|---|
//! | 0..8 | magic `LMTOKENS` |
//! | 8..12 | version, 1 |
//! | 12..16 | bytes per token, 2 or 4 |
//! | 16..24 | vocabulary size: every token is below |
//! | 24..32 | number of tokens |
//! | 32..40 | CRC-32 of the tokens' bytes |
//! | 40..56 | the tokenizer's name, filled with zeros |
//! | 56..60 | zeros |
//! | 60..64 | CRC-32 of bytes 0..60 |
//! | 64.. | the tokens |
//!
//! All numbers are little endian.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::Tokenizer;
use crate::{Error, Result};

/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 64;

pub(super) const MAGIC: &[u8; 8] = b"LMTOKENS";
const VERSION: u32 = 1;
const NAME_BYTES: usize = 16;

/// Shards up to this size have their checksum verified when they are opened (a fraction of a second).
const VERIFIED_AT_OPEN_BYTES: usize = 256 << 20;

/// What a shard says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Bytes per token, 2 or 4.
    pub token_bytes: usize,
    /// Every token is below this.
    pub vocab_size: usize,
    /// Number of tokens.
    pub tokens: u64,
    /// CRC-32 of the tokens' bytes.
    pub checksum: u32,
    /// The tokenizer's name.
    pub tokenizer: String,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.token_bytes as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&(self.vocab_size as u64).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[32..40].copy_from_slice(&u64::from(self.checksum).to_le_bytes());
        bytes[40..40 + self.tokenizer.len()].copy_from_slice(self.tokenizer.as_bytes());
        let checksum = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the header of a file's bytes and compares it with their length.
    fn decode(file: &[u8]) -> std::result::Result<Self, String> {
        let bytes = file.first_chunk::<HEADER_BYTES>().ok_or("truncated: shorter than a shard's header")?;
        if &bytes[..8] != MAGIC {
            return Err("not a token shard (wrong magic)".into());
        }
        if u32_at(bytes, 8) != VERSION {
            return Err(format!("version {}; this program reads {VERSION}", u32_at(bytes, 8)));
        }
        if u32_at(bytes, 60) != crc32fast::hash(&bytes[..60]) {
            return Err("damaged header (wrong checksum)".into());
        }
        let header = Self::fields(bytes)?;
        let expected = header.tokens.checked_mul(header.token_bytes as u64).and_then(|n| n.checked_add(64));
        if expected != Some(file.len() as u64) {
            let (tokens, len) = (header.tokens, file.len());
            return Err(format!("truncated or overlong: {len} bytes do not hold the {tokens} tokens it announces"));
        }
        Ok(header)
    }

    fn fields(bytes: &[u8; HEADER_BYTES]) -> std::result::Result<Self, String> {
        let token_bytes = u32_at(bytes, 12) as usize;
        let vocab_size = u64_at(bytes, 16);
        let most = match token_bytes {
            2 => 1 << 16,
            4 => 1 << 31,
            other => return Err(format!("{other} bytes per token; expected 2 or 4")),
        };
        if vocab_size == 0 || vocab_size > most {
            return Err(format!("a vocabulary of {vocab_size} in {token_bytes} bytes per token"));
        }
        let checksum = u32::try_from(u64_at(bytes, 32)).map_err(|_| "impossible checksum")?;
        let name = &bytes[40..40 + NAME_BYTES];
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(NAME_BYTES);
        let tokenizer = std::str::from_utf8(&name[..end]).map_err(|_| "the tokenizer's name is no text")?.to_owned();
        Ok(Self { token_bytes, vocab_size: vocab_size as usize, tokens: u64_at(bytes, 24), checksum, tokenizer })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

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
        let header = Header::decode(&map).map_err(|detail| Error::data(path, detail))?;
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
        if crc32fast::hash(&self.map[HEADER_BYTES..]) != self.header.checksum {
            return Err(Error::data(&self.path, "damaged (wrong checksum); run `lm prepare` again"));
        }
        Ok(())
    }

    /// Appends `len` tokens from `start` on to `tokens`.
    ///
    /// # Errors
    /// Tokens that lie outside the shard or outside the vocabulary.
    pub fn read(&self, start: u64, len: usize, tokens: &mut Vec<i64>) -> Result<()> {
        let end = start.checked_add(len as u64).filter(|&end| end <= self.header.tokens);
        let Some(end) = end else {
            let held = self.header.tokens;
            return Err(Error::data(&self.path, format!("tokens {start} and {len} more asked of {held}")));
        };
        let width = self.header.token_bytes;
        let bytes = &self.map[HEADER_BYTES + start as usize * width..HEADER_BYTES + end as usize * width];
        let first = tokens.len();
        match width {
            2 => tokens.extend(bytes.chunks_exact(2).map(|b| i64::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => tokens.extend(bytes.chunks_exact(4).map(|b| i64::from(u32_at(b, 0)))),
        }
        let vocabulary = self.header.vocab_size as i64;
        match tokens[first..].iter().position(|&token| token >= vocabulary) {
            None => Ok(()),
            Some(offset) => {
                let (token, at) = (tokens[first + offset], start + offset as u64);
                Err(Error::data(&self.path, format!("token {token} at {at} is outside the vocabulary of {vocabulary}")))
            }
        }
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
    /// Starts a file; it must not exist.
    pub fn create(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let vocab_size = tokenizer.vocab_size();
        let token_bytes = if vocab_size <= 1 << 16 { 2 } else { 4 };
        let tokenizer = tokenizer.name().to_owned();
        let header = Header { token_bytes, vocab_size, tokens: 0, checksum: 0, tokenizer };
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

    /// Writes the header and makes all durable; gives the number of tokens.
    pub fn finish(mut self) -> Result<u64> {
        self.header.checksum = self.checksum.finalize();
        let header = self.header.encode();
        let file = &mut self.file;
        let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header)).and_then(|()| file.flush());
        written.and_then(|()| self.file.get_ref().sync_all()).map_err(Error::io("write", &self.path))?;
        Ok(self.header.tokens)
    }
}
