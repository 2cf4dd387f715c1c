//! TensorBoard's event files: length-delimited protobuf records, each with checksums.
//!
//! Written by hand because it is this short: the crate for it cannot report a full disk, truncates a file that was begun in
//! the same second, and brings a protobuf runtime.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// An event file that scalars are appended to.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Begins a new file in `folder`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path) -> Result<EventFile> {
        let mut seconds = now() as u64;
        let host = super::metadata::host();
        loop {
            let path = folder.join(format!("events.out.tfevents.{seconds}.{host}"));
            match File::create_new(&path) {
                Ok(file) => {
                    let mut events = EventFile { file, path };
                    events.record(&event(0, &field_bytes(3, b"brain.Event:2")))?;
                    return Ok(events);
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => seconds += 1,
                Err(error) => return Err(Error::io("create", &path)(error)),
            }
        }
    }

    /// Appends the value of `tag` at `step`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64) -> Result<()> {
        // Summary { value: [Value { tag = 1, simple_value = 2 }] } is field 5 of Event.
        let mut inner = field_bytes(1, tag.as_bytes());
        inner.push(2 << 3 | FIXED_32);
        inner.extend((value as f32).to_le_bytes());
        self.record(&event(step, &field_bytes(5, &field_bytes(1, &inner))))
    }

    /// length (8 bytes), checksum of the length, data, checksum of the data.
    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut bytes = length.to_vec();
        bytes.extend(masked_crc(&length).to_le_bytes());
        bytes.extend(data);
        bytes.extend(masked_crc(data).to_le_bytes());
        self.file.write_all(&bytes).map_err(Error::io("write", &self.path))
    }
}

const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const BYTES: u8 = 2;
const FIXED_32: u8 = 5;

/// Event { wall_time = 1, step = 2, … }.
fn event(step: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1 << 3 | FIXED_64];
    bytes.extend(now().to_le_bytes());
    bytes.push(2 << 3 | VARINT);
    bytes.extend(varint(step));
    bytes.extend(rest);
    bytes
}

fn field_bytes(number: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | BYTES];
    bytes.extend(varint(data.len() as u64));
    bytes.extend(data);
    bytes
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// CRC-32C, rotated and shifted as TensorFlow's records want it.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_the_standards_example() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn records_are_framed_and_hold_the_scalar() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path()).unwrap();
        events.scalar("train/loss", 300, 1.5).unwrap();
        EventFile::create(folder.path()).unwrap(); // in the same second: another file
        let bytes = std::fs::read(&events.path).unwrap();
        let mut rest = &bytes[..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked_crc(&rest[..8]).to_le_bytes());
            let data = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], masked_crc(data).to_le_bytes());
            records.push(data.to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"brain.Event:2"));
        assert_eq!(records[1][9..12], [2 << 3, 0xac, 0x02]); // step 300
        assert!(records[1].ends_with(
            &[&[1 << 3 | BYTES, 10][..], b"train/loss", &[2 << 3 | FIXED_32], &1.5f32.to_le_bytes()].concat()
        ));
    }
}
