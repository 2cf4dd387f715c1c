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
//! | 56..60 | CRC-32 of the tokens' bytes of the shard before it in its part; zeros in the first (and where an earlier program wrote it) |
//! | 60..64 | CRC-32 of bytes 0..60 |
//! | 64.. | the tokens |
//!
//! All numbers are little endian.

use crate::Malformed;

/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 64;

/// A shard begins with these.
pub const MAGIC: &[u8; 8] = b"LMTOKENS";
const VERSION: u32 = 1;
const NAME_BYTES: usize = 16;

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
    /// The checksum of the shard before it in its part; 0 in the first, and where nobody noted it.
    pub before: u32,
}

impl Header {
    /// The header as bytes. Of the tokenizer's name at most 16 are kept.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.token_bytes as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&(self.vocab_size as u64).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[32..40].copy_from_slice(&u64::from(self.checksum).to_le_bytes());
        let name = &self.tokenizer.as_bytes()[..self.tokenizer.len().min(NAME_BYTES)];
        bytes[40..40 + name.len()].copy_from_slice(name);
        bytes[56..60].copy_from_slice(&self.before.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the header of a whole file's bytes and compares it with their number.
    ///
    /// # Errors
    /// Bytes that are no shard, of another version, damaged or cut; the tokens are not looked at.
    pub fn decode(file: &[u8]) -> Result<Self, Malformed> {
        let bytes = file.first_chunk::<HEADER_BYTES>().ok_or("truncated: shorter than a shard's header")?;
        if &bytes[..8] != MAGIC {
            return Err("not a token shard (wrong magic)".into());
        }
        if u32_at(bytes, 8) != VERSION {
            return Err(format!("version {}; this program reads {VERSION}", u32_at(bytes, 8)).into());
        }
        if u32_at(bytes, 60) != crc32fast::hash(&bytes[..60]) {
            return Err("damaged header (wrong checksum)".into());
        }
        let header = Self::fields(bytes)?;
        let expected = header.tokens.checked_mul(header.token_bytes as u64).and_then(|n| n.checked_add(64));
        if expected != Some(file.len() as u64) {
            let (tokens, len) = (header.tokens, file.len());
            let text = format!("truncated or overlong: {len} bytes do not hold the {tokens} tokens it announces");
            return Err(text.into());
        }
        Ok(header)
    }

    fn fields(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let token_bytes = u32_at(bytes, 12) as usize;
        let vocab_size = u64_at(bytes, 16);
        let most = match token_bytes {
            2 => 1 << 16,
            4 => 1 << 31,
            other => return Err(format!("{other} bytes per token; expected 2 or 4").into()),
        };
        if vocab_size == 0 || vocab_size > most {
            return Err(format!("a vocabulary of {vocab_size} in {token_bytes} bytes per token").into());
        }
        let checksum = u32::try_from(u64_at(bytes, 32)).map_err(|_| "impossible checksum")?;
        let name = &bytes[40..40 + NAME_BYTES];
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(NAME_BYTES);
        let tokenizer = std::str::from_utf8(&name[..end]).map_err(|_| "the tokenizer's name is no text")?.to_owned();
        let (tokens, before) = (u64_at(bytes, 24), u32_at(bytes, 56));
        Ok(Self { token_bytes, vocab_size: vocab_size as usize, tokens, checksum, tokenizer, before })
    }

    /// Whether the tokens of a file with this header are those that were written.
    ///
    /// # Errors
    /// A wrong checksum.
    pub fn verify(&self, file: &[u8]) -> Result<(), Malformed> {
        match file.get(HEADER_BYTES..).map(crc32fast::hash) {
            Some(checksum) if checksum == self.checksum => Ok(()),
            _ => Err("damaged (wrong checksum); run `lm prepare` again".into()),
        }
    }

    /// Appends `len` tokens from `start` on, of a file with this header, to `tokens`.
    ///
    /// # Errors
    /// Tokens that lie outside the shard or outside the vocabulary.
    pub fn read(&self, file: &[u8], start: u64, len: usize, tokens: &mut Vec<i64>) -> Result<(), Malformed> {
        let end = start.checked_add(len as u64).filter(|&end| end <= self.tokens);
        let bytes = end.and_then(|end| {
            let at = |token: u64| Some(HEADER_BYTES + usize::try_from(token).ok()?.checked_mul(self.token_bytes)?);
            file.get(at(start)?..at(end)?)
        });
        let held = self.tokens;
        let bytes = bytes.ok_or_else(|| format!("tokens {start} and {len} more asked of {held}"))?;
        let first = tokens.len();
        match self.token_bytes {
            2 => tokens.extend(bytes.chunks_exact(2).map(|b| i64::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => tokens.extend(bytes.chunks_exact(4).map(|b| i64::from(u32_at(b, 0)))),
        }
        let vocabulary = self.vocab_size as i64;
        match tokens[first..].iter().position(|&token| token >= vocabulary) {
            None => Ok(()),
            Some(offset) => {
                let (token, at) = (tokens[first + offset], start + offset as u64);
                Err(format!("token {token} at {at} is outside the vocabulary of {vocabulary}").into())
            }
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shard(tokens: &[u32], vocab_size: usize, token_bytes: usize) -> (Header, Vec<u8>) {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()[..token_bytes].to_vec()).collect();
        let checksum = crc32fast::hash(&bytes);
        let (tokens, tokenizer) = (tokens.len() as u64, "byte".to_string());
        let header = Header { token_bytes, vocab_size, tokens, checksum, tokenizer, before: 77 };
        let file = [&header.encode()[..], &bytes].concat();
        (header, file)
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(tokens in prop::collection::vec(0u32..500, 0..50), wide in any::<bool>(), from in 0usize..60, len in 0usize..60) {
            let (header, file) = shard(&tokens, 500, if wide { 4 } else { 2 });
            prop_assert_eq!(Header::decode(&file), Ok(header.clone()));
            prop_assert_eq!(header.verify(&file), Ok(()));
            let mut read = Vec::new();
            let outcome = header.read(&file, from as u64, len, &mut read);
            match tokens.get(from..from + len) {
                Some(expected) => prop_assert!(outcome.is_ok() && read.iter().map(|token| *token as u32).eq(expected.iter().copied())),
                None => prop_assert!(outcome.is_err() && read.is_empty()),
            }
        }

        #[test]
        fn a_flipped_bit_is_noticed(at in 0usize..(HEADER_BYTES + 40), bit in 0u8..8) {
            let (_, mut file) = shard(&[7; 20], 256, 2);
            file[at] ^= 1 << bit;
            prop_assert!(Header::decode(&file).and_then(|header| header.verify(&file)).is_err());
        }
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_refused() {
        let (header, file) = shard(&[1, 9], 9, 2);
        let refused = header.read(&file, 0, 2, &mut Vec::new()).map_err(|error| error.to_string());
        assert_eq!(refused, Err("token 9 at 1 is outside the vocabulary of 9".to_string()));
    }
}
