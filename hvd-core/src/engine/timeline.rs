//! What happened when, as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open.
//!
//! The format is the array form of Chrome's trace events, one event a line. All ranks of a host add to one file, under a lock;
//! each piece goes over the closing bracket and brings another, so that the file is whole between any two of them, whoever is
//! the last. A rank is a *process* of the trace, a tensor a *thread* of it. The slice of an operation holds those of its
//! stations, one after the other; a rank was ready when its slice begins. What the program itself marks ([`Timeline::slice`])
//! stands above, in rows of its own.
//!
//! Whoever drives the engine only puts a record into a bounded queue. A thread of its own writes; what finds the queue full
//! is lost, which the file tells.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::observe::{Observer, Phase};
use super::submission::{OpKind, Submission};
use crate::error::{Error, Result};
use crate::topology::Topology;

/// Records that may wait to be written.
const QUEUE: usize = 1 << 16;

/// Most records that are written at once.
const AT_ONCE: usize = 1 << 12;

/// The end of a file.
const END: &str = "\n]\n";

/// Where an event begins that was not written to its end, at most so many bytes from the end.
const LONGEST_EVENT: u64 = 64 << 10;

/// A timeline being written. Dropping it completes the file.
pub struct Timeline {
    /// Taken when the timeline ends.
    records: Mutex<Option<SyncSender<Record>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    lost: AtomicU64,
    mark_rounds: bool,
}

struct Record {
    at: Instant,
    what: What,
}

enum What {
    Submitted { name: String, operation: &'static str, detail: Value },
    Reached { name: String, phase: Phase },
    Round,
    Slice { row: &'static str, name: &'static str, started: Instant },
    Lost(u64),
}

impl Timeline {
    /// Starts to append to `path` what the rank at `place` does, served by `backend`. Where the ranks are on several hosts,
    /// each host has a file of its own, with the host's name before the extension. With `mark_rounds`, rounds of
    /// negotiation are shown.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened or written.
    pub fn start(path: &Path, mark_rounds: bool, place: &Topology, backend: &str) -> Result<Self> {
        let path = path_on_host(path, place);
        let what = || format!("writing the timeline {}", path.display());
        let open = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = open.map_err(|error| Error::io(what(), error))?;
        let head = [("process_name", json!({ "name": format!("rank {}", place.rank) }))];
        let head = head.into_iter().chain([("process_sort_index", json!({ "sort_index": place.rank }))]);
        let head =
            head.map(|(name, args)| json!({ "ph": "M", "name": name, "pid": place.rank, "args": args })).collect();
        append(&file, head).map_err(|error| Error::io(what(), error))?;

        let (records, queue) = sync_channel(QUEUE);
        let writer = Writer::new(file, place.rank, format!("WIRE_{}", backend.to_uppercase()));
        let thread = std::thread::Builder::new().name("hvd-timeline".into());
        let writer = thread
            .spawn(move || writer.write(queue))
            .map_err(|error| Error::io("cannot start the timeline's thread", error))?;
        let (records, writer) = (Mutex::new(Some(records)), Mutex::new(Some(writer)));
        Ok(Timeline { records, writer, lost: AtomicU64::new(0), mark_rounds })
    }

    /// Ends the timeline; the file is complete afterwards.
    pub fn stop(&self) {
        drop(self.records.lock().take());
        if let Some(writer) = self.writer.lock().take() {
            drop(writer.join());
        }
    }

    /// Records that the program did `name` from `started` until now, in its row `row`.
    pub fn slice(&self, row: &'static str, name: &'static str, started: Instant) {
        self.record(What::Slice { row, name, started });
    }

    fn record(&self, what: What) {
        let records = self.records.lock();
        let Some(records) = &*records else { return };
        let at = Instant::now();
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let tell_lost = lost == 0 || records.try_send(Record { at, what: What::Lost(lost) }).is_ok();
        if !tell_lost || records.try_send(Record { at, what }).is_err() {
            self.lost.fetch_add(if tell_lost { 1 } else { lost + 1 }, Ordering::Relaxed);
        }
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Observer for Timeline {
    fn submitted(&self, submission: &Submission) {
        let Submission { name, kind, dtype, shape, input, .. } = submission;
        let detail = json!({ "dtype": dtype.to_string(), "shape": shape, "bytes": input.len() });
        self.record(What::Submitted { name: name.clone(), operation: operation(kind), detail });
    }

    fn event(&self, tensor: &str, phase: Phase) {
        self.record(What::Reached { name: tensor.into(), phase });
    }

    fn round(&self) {
        if self.mark_rounds {
            self.record(What::Round);
        }
    }
}

/// The name of an operation in the trace, as Horovod writes it.
fn operation(kind: &OpKind) -> &'static str {
    match kind {
        OpKind::Allreduce(_) => "ALLREDUCE",
        OpKind::Broadcast { .. } => "BROADCAST",
        OpKind::Allgather => "ALLGATHER",
        OpKind::Alltoall { .. } => "ALLTOALL",
        OpKind::Reducescatter(_) => "REDUCESCATTER",
        OpKind::Barrier => "BARRIER",
        OpKind::Join => "JOIN",
    }
}

/// Removes what an earlier run left in the file of this rank's host.
pub fn remove(path: &Path, place: &Topology) -> Result<()> {
    let path = path_on_host(path, place);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot replace the timeline {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// The file of this rank's host.
fn path_on_host(path: &Path, place: &Topology) -> PathBuf {
    if place.is_single_host() {
        return path.to_path_buf();
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let extension = path.extension().map(|extension| format!(".{}", extension.to_string_lossy())).unwrap_or_default();
    path.with_extension(format!("{host}{extension}"))
}

/// Adds events as one piece, in the place of the end of the array.
fn append(file: &File, events: Vec<Value>) -> std::io::Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    file.lock()?;
    let written = append_locked(file, &events.iter().map(Value::to_string).collect::<Vec<_>>().join(",\n"));
    file.unlock()?;
    written
}

fn append_locked(file: &File, events: &str) -> std::io::Result<()> {
    let (at, begin) = end_of(file)?;
    file.write_all_at(format!("{begin}{events}{END}").as_bytes(), at)
}

/// Where more events go, and what goes before them. What a rank that was killed has left of its last event is cut off.
fn end_of(file: &File) -> std::io::Result<(u64, &'static str)> {
    let length = file.metadata()?.len();
    if tail(file, length, END.len() as u64)? == END.as_bytes() {
        return Ok((length - END.len() as u64, ",\n"));
    }
    let tail = tail(file, length, LONGEST_EVENT)?;
    let last = tail.windows(2).rposition(|pair| pair == b",\n");
    let (at, begin) = match last {
        Some(last) => (length - (tail.len() - last) as u64, ",\n"),
        None if tail.len() as u64 == length && b"[\n".starts_with(&tail[..tail.len().min(2)]) => (0, "[\n"),
        None => (length, "\n"), // Not ours.
    };
    if at < length {
        file.set_len(at)?;
    }
    Ok((at, begin))
}

/// The last bytes of a file, as many as there are.
fn tail(file: &File, length: u64, most: u64) -> std::io::Result<Vec<u8>> {
    let count = length.min(most);
    let mut bytes = vec![0; count as usize];
    file.read_exact_at(&mut bytes, length - count)?;
    Ok(bytes)
}

/// The thread that writes.
struct Writer {
    file: File,
    rank: usize,
    /// What the time on the wire is called.
    wire: String,
    /// The lanes of each tensor: more than one where the next operation of a name is submitted while one still runs.
    lanes: HashMap<String, Vec<Lane>>,
    /// The numbers of the program's own rows.
    rows: HashMap<&'static str, usize>,
    /// Lanes and rows so far.
    count: usize,
    events: Vec<Value>,
    started: (Instant, SystemTime),
}

/// A row of the trace.
struct Lane {
    number: usize,
    /// How far its operation has come; `None` between two.
    at: Option<Phase>,
}

impl Writer {
    fn new(file: File, rank: usize, wire: String) -> Self {
        let started = (Instant::now(), SystemTime::now());
        let (lanes, rows) = Default::default();
        Writer { file, rank, wire, lanes, rows, count: 0, events: Vec::new(), started }
    }

    fn write(mut self, queue: Receiver<Record>) {
        while let Ok(record) = queue.recv() {
            self.take(record);
            queue.try_iter().take(AT_ONCE).for_each(|record| self.take(record));
            if let Err(error) = append(&self.file, std::mem::take(&mut self.events)) {
                tracing::warn!("the timeline ends here, as it cannot be written: {error}");
                return;
            }
        }
        self.end();
    }

    fn take(&mut self, Record { at, what }: Record) {
        let ts = self.microseconds(at);
        match what {
            What::Submitted { name, operation, detail } => self.begin(&name, ts, operation, detail),
            What::Reached { name, phase } => self.reach(&name, ts, phase),
            What::Round => self.instant(ts, "ROUND"),
            What::Slice { row, name, started } => self.slice(row, name, self.microseconds(started), ts),
            What::Lost(count) => self.instant(ts, &format!("{count} RECORDS LOST")),
        }
    }

    /// Opens the slices of an operation that has been submitted, in a free lane.
    fn begin(&mut self, name: &str, ts: f64, operation: &str, detail: Value) {
        let lanes = self.lanes.entry(name.into()).or_default();
        let free = lanes.iter().position(|lane| lane.at.is_none()).unwrap_or(lanes.len());
        if free == lanes.len() {
            self.count += 1;
            lanes.push(Lane { number: self.count, at: None });
            self.describe(self.count, "thread_name", json!({ "name": name }));
        }
        let Some(lane) = self.lanes.get_mut(name).and_then(|lanes| lanes.get_mut(free)) else { return };
        lane.at = Some(Phase::Submitted);
        let lane = lane.number;
        self.open(lane, ts, operation, detail);
        self.open(lane, ts, &format!("NEGOTIATE_{operation}"), json!({}));
    }

    /// Closes a station's slice and opens the next one's.
    fn reach(&mut self, name: &str, ts: f64, phase: Phase) {
        let lanes = self.lanes.get_mut(name).into_iter().flatten().filter(|lane| lane.at.is_some_and(|at| at < phase));
        // What is refused has come least far; what goes on is the one before its turn.
        let lane =
            if phase == Phase::Failed { lanes.min_by_key(|lane| lane.at) } else { lanes.max_by_key(|lane| lane.at) };
        let Some(lane) = lane else { return };
        let number = lane.number;
        lane.at = (phase < Phase::Done).then_some(phase);
        let next = match phase {
            Phase::Negotiated => "QUEUE",
            Phase::CopyIn => "COPY_IN",
            Phase::Wire => &self.wire.clone(),
            Phase::CopyOut => "COPY_OUT",
            Phase::Submitted | Phase::Done | Phase::Failed => "",
        };
        self.close(number, ts, json!({}));
        match phase {
            Phase::Done => self.close(number, ts, json!({})),
            Phase::Failed => self.close(number, ts, json!({ "failed": true })),
            _ => self.open(number, ts, next, json!({})),
        }
    }

    /// Closes what is open.
    fn end(&mut self) {
        let ts = self.microseconds(Instant::now());
        let open: Vec<usize> =
            self.lanes.values().flatten().filter(|lane| lane.at.is_some()).map(|lane| lane.number).collect();
        for lane in open {
            self.close(lane, ts, json!({}));
            self.close(lane, ts, json!({ "under way": true }));
        }
        if let Err(error) = append(&self.file, std::mem::take(&mut self.events)) {
            tracing::warn!("the end of the timeline cannot be written: {error}");
        }
    }

    /// A slice of the program's own.
    fn slice(&mut self, row: &'static str, name: &str, from: f64, until: f64) {
        let known = self.rows.get(row).copied();
        let tid = known.unwrap_or_else(|| {
            self.count += 1;
            self.rows.insert(row, self.count);
            self.describe(self.count, "thread_name", json!({ "name": row }));
            self.describe(self.count, "thread_sort_index", json!({ "sort_index": -1 })); // above all tensors
            self.count
        });
        let (pid, dur) = (self.rank, until - from);
        self.events.push(json!({ "ph": "X", "name": name, "pid": pid, "tid": tid, "ts": from, "dur": dur }));
    }

    /// Says something about a row.
    fn describe(&mut self, row: usize, what: &str, args: Value) {
        self.events.push(json!({ "ph": "M", "name": what, "pid": self.rank, "tid": row, "args": args }));
    }

    fn open(&mut self, lane: usize, ts: f64, name: &str, args: Value) {
        self.events.push(json!({ "ph": "B", "name": name, "pid": self.rank, "tid": lane, "ts": ts, "args": args }));
    }

    fn close(&mut self, lane: usize, ts: f64, args: Value) {
        self.events.push(json!({ "ph": "E", "pid": self.rank, "tid": lane, "ts": ts, "args": args }));
    }

    fn instant(&mut self, ts: f64, name: &str) {
        self.events.push(json!({ "ph": "i", "name": name, "pid": self.rank, "tid": 0, "ts": ts, "s": "p" }));
    }

    /// Since 1970, so that the files of several hosts can be laid side by side; the differences are those of a clock that
    /// nobody sets.
    fn microseconds(&self, at: Instant) -> f64 {
        let (instant, time) = self.started;
        let since_1970 = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        (since_1970 + at.saturating_duration_since(instant)).as_nanos() as f64 / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(file: &Path) -> Vec<u64> {
        let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        events.iter().map(|event| event["n"].as_u64().unwrap()).collect()
    }

    #[test]
    fn a_file_that_ends_in_the_middle_of_an_event_becomes_whole_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.json");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        append(&file, vec![json!({ "n": 0 }), json!({ "n": 1, "text": "[\n,\n]\n" })]).unwrap();
        append(&file, vec![json!({ "n": 2 })]).unwrap();
        assert_eq!(numbers(&path), [0, 1, 2]);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..=whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            append(&file, vec![json!({ "n": 7 })]).unwrap();
            let seen = numbers(&path);
            let (last, kept) = seen.split_last().unwrap();
            assert_eq!((*last, kept), (7, &[0, 1, 2][..kept.len()]), "cut to {length} bytes");
            assert!(
                kept.len() + 1 >= String::from_utf8_lossy(&whole[..length]).matches("}").count(),
                "{length}: {seen:?}"
            );
        }
    }
}
