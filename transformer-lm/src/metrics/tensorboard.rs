//! TensorBoard's event files.
//!
//! Of `tensorboard-rs` only the parts that make and frame records: its own writer cannot report a full disk, and truncates
//! a file that was begun in the same second.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::Message;
use tensorboard_proto::event::Event;
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary;

use crate::{Error, Result};

/// What the first record of every file says.
const FILE_VERSION: &str = "brain.Event:2";

/// An event file that scalars are appended to.
pub struct EventFile {
    records: RecordWriter<File>,
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
                    let mut events = EventFile { records: RecordWriter::new(file), path };
                    let mut first = event(0);
                    first.set_file_version(FILE_VERSION.to_string());
                    events.append(&first)?;
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
        let mut event = event(step);
        event.set_summary(summary::scalar(tag, value as f32));
        self.append(&event)
    }

    fn append(&mut self, event: &Event) -> Result<()> {
        let write = |bytes: Vec<u8>| self.records.write(&bytes).and_then(|()| self.records.flush());
        event.write_to_bytes().map_err(std::io::Error::from).and_then(write).map_err(Error::io("write", &self.path))
    }
}

impl std::fmt::Debug for EventFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventFile").field("path", &self.path).finish_non_exhaustive()
    }
}

fn event(step: u64) -> Event {
    let mut event = Event::new();
    event.set_wall_time(now());
    event.set_step(step as i64);
    event
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The data of every record: length (8 bytes), checksum of the length (4), data, checksum of the data (4).
    fn records(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            events.push(Event::parse_from_bytes(&rest[12..12 + length]).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn a_file_holds_its_version_and_the_scalars() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path()).unwrap();
        events.scalar("train/loss", 300, 1.5).unwrap();
        EventFile::create(folder.path()).unwrap(); // in the same second: another file
        let records = records(&events.path);
        assert_eq!(records.len(), 2);
        assert_eq!(records[0].get_file_version(), FILE_VERSION);
        let value = &records[1].get_summary().get_value()[0];
        assert_eq!((records[1].get_step(), value.get_tag(), value.get_simple_value()), (300, "train/loss", 1.5));
    }
}
