//! What `hvdrun` waits for, in one queue.

use std::io::{self, IsTerminal, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use super::connection::News;
use super::message::CHUNK_BYTES;

/// So much may wait to be looked at; then those who bring news wait.
pub const QUEUE: usize = 256;

/// Something to look at.
#[derive(Debug)]
pub enum Event {
    /// From the agent of the host at this position.
    News(usize, News),
    /// A signal to hvdrun.
    Signal(i32),
    /// Bytes on our stdin; none: it has ended.
    Input(Vec<u8>),
}

/// Brings the signals that users and systems send to programs.
///
/// # Errors
/// If they cannot be caught.
pub fn bring_signals(queue: SyncSender<Event>) -> Result<()> {
    let mut wanted = vec![SIGUSR1, SIGUSR2];
    // What is ignored from the start, as under nohup, is meant to be.
    wanted.extend([SIGINT, SIGTERM, SIGHUP, SIGQUIT].into_iter().filter(|number| !is_ignored(*number)));
    let mut signals = Signals::new(wanted).context("cannot catch signals")?;
    std::thread::spawn(move || signals.forever().try_for_each(|number| queue.send(Event::Signal(number))));
    Ok(())
}

fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

/// Brings our stdin piece by piece, each after the former was taken, which the given sender tells.
pub fn bring_input(queue: SyncSender<Event>) -> Sender<()> {
    let (taken, wait): (Sender<()>, Receiver<()>) = channel();
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let count = if may_read() { input.read(&mut buffer).unwrap_or(0) } else { 0 };
            let sent = queue.send(Event::Input(buffer[..count].to_vec()));
            if count == 0 || sent.is_err() || wait.recv().is_err() {
                return;
            }
        }
    });
    taken
}

/// Who reads from a terminal in the background is stopped.
fn may_read() -> bool {
    if !io::stdin().is_terminal() {
        return true;
    }
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in parentheses: state, parent, group, session, terminal, the terminal's foreground group; proc(5).
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    fields.len() > 5 && fields[2] == fields[5]
}
