//! TensorBoard's event files.
//!
//! Of `tensorboard-rs` only the parts that make and frame records: its own writer cannot report a full disk, and truncates
//! a file that was begun in the same second.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::Message;
use tch::{Device, Kind, Tensor};
use tensorboard_proto::event::Event;
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary;

use crate::{Error, Result};

/// What the first record of every file says.
const FILE_VERSION: &str = "brain.Event:2";

/// Bars of a histogram.
const BARS: usize = 30;

/// How the elements of a tensor are distributed.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// The smallest element.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many there are.
    pub count: f64,
    /// Their sum.
    pub sum: f64,
    /// The sum of their squares.
    pub sum_of_squares: f64,
    /// How many are in each of equal parts of the range from `min` to `max`.
    pub bars: Vec<f64>,
}

impl Histogram {
    /// The distribution of a tensor's elements; none where it is empty or has elements that are not finite.
    pub fn of(tensor: &Tensor) -> Option<Histogram> {
        let values = tch::no_grad(|| tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).reshape([-1]));
        if values.numel() == 0 {
            return None;
        }
        let (min, max) = (values.min().double_value(&[]), values.max().double_value(&[]));
        let doubles = values.to_kind(Kind::Double);
        let sum_of_squares = doubles.square().sum(Kind::Double).double_value(&[]);
        if !sum_of_squares.is_finite() {
            return None;
        }
        // torch takes an empty range for "from the smallest to the largest element", and widens it.
        let bars = Vec::<f32>::try_from(values.histc(BARS as i64)).ok()?;
        Some(Histogram {
            min,
            max,
            count: values.numel() as f64,
            sum: doubles.sum(Kind::Double).double_value(&[]),
            sum_of_squares,
            bars: bars.into_iter().map(f64::from).collect(),
        })
    }

    /// The upper edge of each bar.
    fn edges(&self) -> Vec<f64> {
        let (low, high) = if self.min < self.max { (self.min, self.max) } else { (self.min - 1.0, self.max + 1.0) };
        (1..=self.bars.len()).map(|i| low + (high - low) * i as f64 / self.bars.len() as f64).collect()
    }
}

/// An event file that is appended to.
pub struct EventFile {
    records: RecordWriter<File>,
    path: PathBuf,
    /// A second handle, to take back a record that was written in part.
    file: File,
    /// Bytes of the whole records.
    len: u64,
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
                    let second = file.try_clone().map_err(Error::io("open", &path))?;
                    let mut events = EventFile { records: RecordWriter::new(file), path, file: second, len: 0 };
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

    /// Appends the distribution of `tag` at `step`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn histogram(&mut self, tag: &str, step: u64, histogram: &Histogram) -> Result<()> {
        let Histogram { min, max, count, sum, sum_of_squares, bars } = histogram;
        let edges = histogram.edges();
        let mut event = event(step);
        event.set_summary(summary::histogram_raw(tag, *min, *max, *count, *sum, *sum_of_squares, &edges, bars));
        self.append(&event)
    }

    /// Appends a record, whole or, where that fails, not at all.
    fn append(&mut self, event: &Event) -> Result<()> {
        let write = |bytes: Vec<u8>| {
            self.records.write(&bytes)?;
            self.records.flush()?;
            self.file.stream_position()
        };
        match event.write_to_bytes().map_err(std::io::Error::from).and_then(write) {
            Ok(len) => {
                self.len = len;
                Ok(())
            }
            Err(error) => {
                // The handles share one position.
                let _ = self.file.set_len(self.len).and_then(|()| self.file.seek(SeekFrom::Start(self.len)));
                Err(Error::io("write", &self.path)(error))
            }
        }
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

    #[test]
    fn a_histogram_counts_every_element() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path()).unwrap();
        let values: Vec<f32> = (0..1000).map(|i| (i as f32).sin()).collect();
        let histogram = Histogram::of(&Tensor::from_slice(&values)).unwrap();
        events.histogram("weights/w", 7, &histogram).unwrap();
        let records = records(&events.path);
        let read = records[1].get_summary().get_value()[0].get_histo();
        assert_eq!((read.get_num(), read.get_bucket().iter().sum::<f64>()), (1000.0, 1000.0));
        assert!((read.get_sum() - values.iter().map(|v| f64::from(*v)).sum::<f64>()).abs() < 1e-6);
        let (edges, bars) = (read.get_bucket_limit(), read.get_bucket());
        for (i, edge) in edges.iter().enumerate() {
            let below = values.iter().filter(|value| f64::from(**value) < edge + 1e-6).count() as f64;
            assert!((bars[..=i].iter().sum::<f64>() - below).abs() <= 1.0);
        }
    }

    #[test]
    fn odd_tensors_have_a_histogram_or_none() {
        let constant = Histogram::of(&Tensor::from_slice(&[2.0f32; 5])).unwrap();
        assert_eq!((constant.min, constant.max, constant.bars.iter().sum::<f64>()), (2.0, 2.0, 5.0));
        assert_eq!((constant.edges()[0] > 1.0, constant.edges()[BARS - 1]), (true, 3.0));
        assert_eq!(Histogram::of(&Tensor::from_slice(&[1.0f32, f32::NAN])), None);
        assert_eq!(Histogram::of(&Tensor::from_slice::<f32>(&[])), None);
    }
}
