//! The processes of the ranks of one host.

use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind, Read};
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, getppid, kill_process_group, waitid};

use super::agent::Mouth;
use super::message::{CHUNK_BYTES, End, FromAgent, Order, Stream, Variable};
use super::report;

/// How long output is awaited that processes still hold open which have left a rank's process group.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// How many threads OpenMP's loops get, libtorch's among them.
const THREADS: &str = "OMP_NUM_THREADS";

/// The processes that run.
pub struct Ranks {
    living: Arc<Living>,
}

/// The process groups of the ranks that have not ended.
#[derive(Default)]
struct Living {
    groups: Mutex<Vec<Pid>>,
    changed: Condvar,
}

/// Why the ranks could not be started.
pub struct StartError {
    /// What to end with.
    pub code: u8,
    /// What went wrong.
    pub error: anyhow::Error,
}

impl Ranks {
    /// Starts all ranks of this host; each listens on `bind`, if it is given and there are other hosts. Gives rank 0's stdin if rank 0 is here.
    ///
    /// # Errors
    /// If one cannot be started; none is left running then.
    pub fn start(
        order: &Order,
        bind: Option<IpAddr>,
        mouth: &Mouth,
    ) -> Result<(Ranks, Option<ChildStdin>), StartError> {
        let ranks = Ranks { living: Arc::default() };
        let mut stdin = None;
        for (rank, variables) in &order.ranks {
            let mut command = command(order, *rank, variables, bind);
            let mut child = command.spawn().map_err(|error| {
                ranks.signal(Signal::KILL);
                refusal(order, error)
            })?;
            mouth.say(FromAgent::Started { rank: *rank, pid: child.id() });
            stdin = stdin.or(child.stdin.take());
            ranks.living.add(Pid::from_child(&child));
            watch(*rank, child, ranks.living.clone(), mouth.clone());
        }
        Ok((ranks, stdin))
    }

    /// Sends a signal to all that is left of every rank.
    pub fn signal(&self, signal: Signal) {
        for group in self.living.lock().iter() {
            // It may have ended a moment ago.
            let _ = kill_process_group(*group, signal);
        }
    }

    /// Asks all ranks to end, and kills those that have not after `grace`.
    pub fn end(&self, grace: Duration) {
        self.signal(Signal::TERM);
        // A stopped process cannot end.
        self.signal(Signal::CONT);
        if !self.living.wait_until_empty(grace) {
            self.signal(Signal::KILL);
            self.living.wait_until_empty(DRAIN_TIMEOUT);
        }
    }
}

impl Living {
    fn lock(&self) -> MutexGuard<'_, Vec<Pid>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, group: Pid) {
        self.lock().push(group);
    }

    fn remove(&self, group: Pid) {
        self.lock().retain(|other| *other != group);
        self.changed.notify_all();
    }

    /// Whether all have ended within the time.
    fn wait_until_empty(&self, time: Duration) -> bool {
        let wait = self.changed.wait_timeout_while(self.lock(), time, |groups| !groups.is_empty());
        wait.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }
}

fn command(order: &Order, rank: usize, variables: &[Variable], bind: Option<IpAddr>) -> Command {
    let mut words = order.command.iter().map(|word| OsStr::from_bytes(word));
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).current_dir(&order.folder);
    for name in &order.removed {
        command.env_remove(name);
    }
    if let Some(threads) = share_of_threads(order.ranks.len()) {
        command.env(THREADS, threads.to_string());
    }
    let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    command.envs(order.variables.iter().chain(variables).map(|(name, value)| (text(name), text(value))));
    if let Some(rendezvous) = order.rendezvous {
        command.env("HVD_RENDEZVOUS", rendezvous.to_string());
        command.envs(bind.map(|bind| ("HVD_BIND", bind.to_string())));
    }
    command.stdin(if rank == 0 { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    end_with_parent(&mut command);
    command
}

/// The threads of each of several ranks that share this host's cores, where nobody says how many. With more threads than cores those
/// that have nothing to do spin in the way of the others, which makes small loops ten times slower.
fn share_of_threads(ranks: usize) -> Option<usize> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (ranks > 1 && std::env::var_os(THREADS).is_none()).then(|| (cores / ranks).max(1))
}

/// Has the kernel kill the process when this one, which starts it from its main thread, ends in whatever way.
fn end_with_parent(command: &mut Command) {
    let parent = getpid();
    let ask = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have died before we asked.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::Error::from(ErrorKind::NotFound)) }
    };
    // SAFETY: between fork and exec only two system calls are made, which allocate nothing and take no lock.
    unsafe { command.pre_exec(ask) };
}

/// Why the program does not start, with a shell's exit codes.
fn refusal(order: &Order, error: io::Error) -> StartError {
    let program = String::from_utf8_lossy(order.command.first().map_or(b"", |word| word)).into_owned();
    let folder = order.folder.display();
    if !order.folder.is_dir() {
        let error =
            anyhow!("the working folder {folder} is not there; hvdrun runs the ranks in the folder that it runs in");
        return StartError { code: report::NOT_FOUND, error };
    }
    match error.kind() {
        ErrorKind::NotFound => StartError {
            code: report::NOT_FOUND,
            error: anyhow!("there is no program {program}; give a path, or a name that PATH knows"),
        },
        _ => StartError { code: report::NOT_RUNNABLE, error: anyhow!(error).context(format!("cannot run {program}")) },
    }
}

/// Passes on what a rank prints, and says how it ended.
fn watch(rank: usize, mut child: Child, living: Arc<Living>, mouth: Mouth) {
    let (open, closed) = channel();
    if let Some(pipe) = child.stdout.take() {
        pump(rank, Stream::Stdout, pipe, mouth.clone(), open.clone());
    }
    if let Some(pipe) = child.stderr.take() {
        pump(rank, Stream::Stderr, pipe, mouth.clone(), open);
    }
    std::thread::spawn(move || {
        let group = Pid::from_child(&child);
        // While the process is not reaped, its number is nobody else's.
        let _ = waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let _ = kill_process_group(group, Signal::KILL);
        let status = child.wait().with_context(|| format!("waiting for rank {rank}"));
        // Ends as soon as both pumps have dropped their ends.
        let _ = closed.recv_timeout(DRAIN_TIMEOUT);
        mouth.say(FromAgent::Ended { rank, end: status.map_or(End::Code(-1), end_of) });
        living.remove(group);
    });
}

fn end_of(status: ExitStatus) -> End {
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Code(code),
        (None, signal) => End::Signal(signal.unwrap_or(0)),
    }
}

/// Passes on what comes out of a pipe, and drops `open` at its end.
fn pump(rank: usize, stream: Stream, mut pipe: impl Read + Send + 'static, mouth: Mouth, open: Sender<()>) {
    std::thread::spawn(move || {
        let _open = open;
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => mouth.say(FromAgent::Output { rank, stream, bytes: buffer[..count].to_vec() }),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
}
