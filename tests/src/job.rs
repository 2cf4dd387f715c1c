//! A job: all ranks of one program, their output, and their end.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::{Hosts, Launcher};

/// What is to be started.
pub struct Job {
    program: PathBuf,
    args: Vec<OsString>,
    vars: Vec<(String, String)>,
    /// Those of single processes, by number.
    own_vars: Vec<(usize, String, String)>,
    ranks: usize,
    launcher: Launcher,
    hosts: Option<Arc<Hosts>>,
    launcher_args: Vec<OsString>,
    stdin: Option<File>,
    limit: Duration,
}

/// A job whose processes have been started. Dropping it kills them.
pub struct Running {
    /// One process a rank, or the launcher's one.
    children: Vec<Child>,
    output: Output,
    deadline: Instant,
    limit: Duration,
}

/// A job that has ended.
pub struct Finished {
    /// How each process ended: one a rank, or the launcher's one.
    pub statuses: Vec<ExitStatus>,
    /// Everything the ranks printed.
    pub stdout: String,
    /// Everything the ranks complained of.
    pub stderr: String,
    /// The same for each process.
    pub complaints: Vec<String>,
    /// How long it took from the start.
    pub elapsed: Duration,
}

struct Output {
    folder: tempfile::TempDir,
    started: Instant,
}

impl Job {
    /// `ranks` processes of `program`, started one by one, for at most two minutes.
    pub fn new(program: impl Into<PathBuf>, ranks: usize) -> Self {
        let limit = Duration::from_secs(120);
        Job {
            program: program.into(),
            args: Vec::new(),
            vars: Vec::new(),
            own_vars: Vec::new(),
            ranks,
            launcher: Launcher::Spawn,
            launcher_args: Vec::new(),
            hosts: None,
            stdin: None,
            limit,
        }
    }

    /// Adds arguments of the program.
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable on all ranks.
    pub fn var(mut self, name: &str, value: impl ToString) -> Self {
        self.vars.push((name.into(), value.to_string()));
        self
    }

    /// Sets an environment variable on one rank of a job that is started one by one.
    pub fn var_on(mut self, rank: usize, name: &str, value: impl ToString) -> Self {
        self.own_vars.push((rank, name.into(), value.to_string()));
        self
    }

    /// Who starts the ranks.
    pub fn launcher(mut self, launcher: Launcher) -> Self {
        self.launcher = launcher;
        self
    }

    /// Deals the ranks to hosts in blocks of equal size; they are started one by one.
    pub fn hosts(mut self, hosts: Arc<Hosts>) -> Self {
        self.hosts = Some(hosts);
        self
    }

    /// Adds arguments of the launcher.
    pub fn launcher_args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.launcher_args.extend(args.into_iter().map(Into::into));
        self
    }

    /// What the launcher, or the first process, reads. Nothing unless it is said.
    pub fn stdin(mut self, file: File) -> Self {
        self.stdin = Some(file);
        self
    }

    /// After this time the job is killed and the test fails.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts all processes.
    pub fn start(mut self) -> Running {
        let output = Output { folder: tempfile::tempdir().expect("a temporary folder"), started: Instant::now() };
        let commands = match self.launcher.command(self.ranks, &self.launcher_args, &self.program) {
            Some(command) => vec![command],
            None => self.spawned(),
        };
        let start = |(at, mut command): (usize, Command)| {
            let stdin = self.stdin.take().map_or_else(Stdio::null, Stdio::from);
            let own = self.own_vars.iter().filter(|(rank, ..)| *rank == at).map(|(_, name, value)| (name, value));
            command.args(&self.args).envs(self.vars.iter().cloned()).envs(own).stdin(stdin);
            command.stdout(output.file("stdout", at)).stderr(output.file("stderr", at));
            // A group of its own, so that a launcher dies together with what it started.
            command.process_group(0).spawn().expect("a process")
        };
        let children = commands.into_iter().enumerate().map(start).collect();
        Running { children, output, deadline: Instant::now() + self.limit, limit: self.limit }
    }

    /// Starts all processes and waits for their end.
    ///
    /// # Panics
    /// If the job takes longer than its limit.
    pub fn run(self) -> Finished {
        self.start().wait()
    }

    fn spawned(&self) -> Vec<Command> {
        let job = format!("test-{}-{:x}", std::process::id(), rand::random::<u64>());
        let command = |rank: usize| {
            let mut command = self.placed(rank);
            let size = self.ranks.to_string();
            command.env("HVD_RANK", rank.to_string()).env("HVD_SIZE", size).env("HVD_JOB_ID", &job);
            command
        };
        (0..self.ranks).map(command).collect()
    }

    /// The program, on the rank's host.
    fn placed(&self, rank: usize) -> Command {
        let Some(hosts) = &self.hosts else { return Command::new(&self.program) };
        let block = self.ranks.div_ceil(hosts.count());
        let mut command = hosts.command(rank / block, &self.program);
        command.env("HVD_LOCAL_SIZE", block.to_string()).env("HVD_BIND", hosts.address(rank / block));
        command.env("HVD_RENDEZVOUS", format!("{}:29400", hosts.address(0))).env("HVD_SECRET", "of the test's hosts");
        command
    }
}

impl Running {
    /// The process of a rank of a job that was started one by one.
    pub fn pid(&self, rank: usize) -> Pid {
        Pid::from_child(&self.children[rank])
    }

    /// Ends a rank as the kernel does when memory runs out: at once, without a word.
    pub fn kill(&self, rank: usize) {
        self.signal(rank, Signal::KILL);
    }

    /// Sends a rank a signal.
    pub fn signal(&self, rank: usize, signal: Signal) {
        // It may have ended by itself a moment ago.
        let _ = kill_process(self.pid(rank), signal);
    }

    /// What the ranks have printed so far.
    pub fn stdout(&self) -> String {
        self.output.read("stdout")
    }

    /// What the ranks have complained of so far.
    pub fn stderr(&self) -> String {
        self.output.read("stderr")
    }

    /// The process of a rank, whoever started it, as `hvd-worker` prints it.
    pub fn process_of(&self, rank: usize) -> Option<Pid> {
        let text = self.stdout();
        let (_, rest) = text.split_once(&format!("rank {rank} is process "))?;
        Pid::from_raw(rest.split_whitespace().next()?.parse().ok()?)
    }

    /// Waits for the end of some processes.
    ///
    /// # Panics
    /// If the job takes longer than its limit.
    pub fn wait_for_ends(&mut self, ranks: impl IntoIterator<Item = usize>) {
        for rank in ranks {
            while self.children[rank].try_wait().expect("a process's status").is_none() {
                self.watch();
            }
        }
    }

    /// Waits until the output contains `text`; gives up, with `false`, when the job ends before that.
    ///
    /// # Panics
    /// If the job takes longer than its limit.
    pub fn wait_for(&mut self, text: &str) -> bool {
        loop {
            if self.output.read("stdout").contains(text) || self.output.read("stderr").contains(text) {
                return true;
            }
            let ended = self.children.iter_mut().all(|child| child.try_wait().is_ok_and(|status| status.is_some()));
            if ended {
                return false;
            }
            self.watch();
        }
    }

    /// Waits for the end of all processes.
    ///
    /// # Panics
    /// If the job takes longer than its limit.
    pub fn wait(mut self) -> Finished {
        let mut statuses = vec![None; self.children.len()];
        while statuses.iter().any(Option::is_none) {
            for (status, child) in statuses.iter_mut().zip(&mut self.children) {
                *status = status.or_else(|| child.try_wait().expect("a process's status"));
            }
            self.watch();
        }
        Finished {
            statuses: statuses.into_iter().flatten().collect(),
            stdout: self.output.read("stdout"),
            stderr: self.output.read("stderr"),
            complaints: self.output.read_each("stderr"),
            elapsed: self.output.started.elapsed(),
        }
    }

    /// A short pause between two looks, and the watchdog.
    fn watch(&self) {
        let (stdout, stderr) = (self.output.read("stdout"), self.output.read("stderr"));
        let limit = self.limit;
        assert!(Instant::now() < self.deadline, "still running after {limit:?}\n{stdout}\n--- stderr\n{stderr}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
            let _ = child.wait();
        }
    }
}

impl Finished {
    /// # Panics
    /// With all output, unless every process ended with code 0.
    pub fn assert_success(&self) -> &Self {
        let Finished { statuses, stdout, stderr, .. } = self;
        assert!(statuses.iter().all(ExitStatus::success), "{statuses:?}\n{stdout}\n--- stderr\n{stderr}");
        self
    }

    /// # Panics
    /// With all output, unless every process ended with another code than 0.
    pub fn assert_failure(&self) -> &Self {
        let Finished { statuses, stdout, stderr, .. } = self;
        assert!(!statuses.iter().any(ExitStatus::success), "{statuses:?}\n{stdout}\n--- stderr\n{stderr}");
        self
    }
}

impl Output {
    fn file(&self, stream: &str, at: usize) -> File {
        File::create(self.folder.path().join(format!("{stream}.{at:04}"))).expect("a file for the output")
    }

    /// What all processes wrote, one after the other.
    fn read(&self, stream: &str) -> String {
        self.read_each(stream).concat()
    }

    /// What each process wrote.
    fn read_each(&self, stream: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).expect("the output's folder");
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.file_stem().is_some_and(|stem| stem == stream));
        paths.sort();
        let read = |path: PathBuf| {
            let bytes = std::fs::read(path).expect("the output");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        paths.into_iter().map(read).collect()
    }
}
