//! `hvdrun`'s end of the conversation with the agent of a host.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Sender, SyncSender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::events::Event;
use super::hosts::Host;
use super::message::{self, FromAgent, GREETING, ToAgent};
use super::options::Options;

/// The argument that makes an agent of this program.
pub const AGENT_FLAG: &str = "--agent";

/// What a login shell may print before the agent greets, in bytes.
const MAX_PREAMBLE_BYTES: u64 = 64 << 10;

/// How long an agent may take to end after its last word.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the end of its complaints is awaited once it is gone.
const COMPLAINT_TIMEOUT: Duration = Duration::from_secs(3);

/// What comes from the agent of a host.
#[derive(Debug)]
pub enum News {
    /// It is there.
    Greeted,
    /// It says something.
    Said(FromAgent),
    /// It, or what leads to it, complains.
    Complained(String),
    /// It is gone, or talks nonsense.
    Gone(String),
}

/// The agent of a host.
pub struct Connection {
    child: Child,
    /// `None` once nothing more is to be said.
    sender: Option<Sender<ToAgent>>,
}

impl Connection {
    /// Starts the agent of a host. `report` is called, from other threads, with what comes from it.
    ///
    /// # Errors
    /// If neither it nor `ssh` can be started.
    pub fn open(host: &Host, options: &Options, report: SyncSender<Event>, at: usize) -> Result<Connection> {
        let mut command = if host.is_here() { local_agent() } else { remote_agent(host, options)? };
        // A group of its own: Ctrl-C is for hvdrun alone to pass on.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().with_context(|| format!("cannot run {program} to reach {}", host.name))?;
        let (sender, receiver) = channel();
        if let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        {
            std::thread::spawn(move || write(stdin, receiver));
            let complaints = report.clone();
            let (complaining, complained) = channel::<()>();
            std::thread::spawn(move || {
                complain(stderr, &complaints, at);
                drop(complaining);
            });
            std::thread::spawn(move || {
                let gone = listen(stdout, &report, at);
                // Why it is gone may be under way on its stderr, which what it has left behind may keep open.
                let _ = complained.recv_timeout(COMPLAINT_TIMEOUT);
                let _ = report.send(Event::News(at, News::Gone(gone)));
            });
        }
        Ok(Connection { child, sender: Some(sender) })
    }

    /// Says something to the agent. That it is gone shows in its news.
    pub fn say(&self, message: ToAgent) {
        if let Some(sender) = &self.sender {
            let _ = sender.send(message);
        }
    }

    /// Says no more, which ends the agent.
    pub fn close(&mut self) {
        self.sender = None;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
        let deadline = Instant::now() + LEAVE_TIMEOUT;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn local_agent() -> Command {
    // Also where our file has been replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("hvdrun").arg(AGENT_FLAG);
    command
}

fn remote_agent(host: &Host, options: &Options) -> Result<Command> {
    let path = match &options.remote_hvdrun {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.to_str().context("the path of hvdrun is not UTF-8")?.to_string(),
    };
    let mut words = options.ssh_command.as_deref().unwrap_or("ssh").split_whitespace();
    let mut command = Command::new(words.next().context("--ssh-command is empty; expected a program")?);
    command.args(words);
    if options.ssh_command.is_none() {
        // It must neither ask anything nor wait for ever for a host that has vanished.
        let settings = ["BatchMode=yes", "ServerAliveInterval=10", "ServerAliveCountMax=3"];
        command.arg("-T").args(settings.iter().flat_map(|setting| ["-o", setting]));
    }
    command.args(options.ssh_port.iter().flat_map(|port| ["-p".to_string(), port.to_string()]));
    command.args(options.ssh_identity_file.iter().flat_map(|file| [OsString::from("-i"), file.into()]));
    command.arg(&host.name).arg(format!("exec {} {AGENT_FLAG}", quoted(&path)));
    Ok(command)
}

/// As one word for the shell of another host.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The path of a program as other hosts and other working folders understand it; a name is left to their PATH.
///
/// # Errors
/// If there is no working folder.
pub fn absolute_program(program: OsString) -> Result<OsString> {
    if !program.as_bytes().contains(&b'/') {
        return Ok(program);
    }
    Ok(std::path::absolute(program).context("the working folder")?.into())
}

fn write(mut stdin: ChildStdin, messages: std::sync::mpsc::Receiver<ToAgent>) {
    for message in messages {
        if message::send(&mut stdin, &message).is_err() {
            return;
        }
    }
}

fn complain(stderr: ChildStderr, report: &SyncSender<Event>, at: usize) {
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_string();
        if report.send(Event::News(at, News::Complained(line))).is_err() {
            return;
        }
    }
}

/// Passes on what the agent says; gives how that ended.
fn listen(stdout: ChildStdout, report: &SyncSender<Event>, at: usize) -> String {
    let mut stdout = BufReader::new(stdout);
    match greet(&mut stdout).and_then(|()| {
        report.send(Event::News(at, News::Greeted)).ok();
        pass_on(&mut stdout, report, at)
    }) {
        Ok(()) => "it ended".to_string(),
        Err(error) => format!("{error:#}"),
    }
}

/// Skips what a login shell prints, up to the agent's greeting.
fn greet(stdout: &mut impl BufRead) -> Result<()> {
    let mut preamble = stdout.take(MAX_PREAMBLE_BYTES);
    let mut line = Vec::new();
    while preamble.read_until(b'\n', &mut line)? > 0 {
        if line == GREETING.as_bytes() {
            return Ok(());
        }
        if line.starts_with(b"hvdrun agent ") {
            let theirs = String::from_utf8_lossy(&line).trim_end().to_string();
            bail!("there runs `{theirs}`, here `{}`; install one build on all hosts", GREETING.trim_end());
        }
        line.clear();
    }
    ensure!(preamble.limit() > 0, "it prints something else than an agent of hvdrun would");
    bail!("it ended before hvdrun's agent was there")
}

fn pass_on(stdout: &mut impl Read, report: &SyncSender<Event>, at: usize) -> Result<()> {
    while let Some(message) = message::receive(stdout).context("a message of its agent")? {
        if report.send(Event::News(at, News::Said(message))).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_login_shell_prints_is_skipped() {
        let text = format!("Welcome!\n\n{GREETING}rest");
        let mut from = text.as_bytes();
        greet(&mut from).unwrap();
        assert_eq!(from, b"rest");
    }

    #[test]
    fn who_is_no_agent_of_ours_is_refused() {
        let refusal = |text: &str| greet(&mut text.as_bytes()).unwrap_err().to_string();
        assert!(refusal("Welcome!\n").contains("ended before"));
        assert!(refusal("hvdrun agent 0.0.1 protocol 0\n").contains("one build on all hosts"));
        assert!(refusal(&"y\n".repeat(100_000)).contains("something else"));
    }

    #[test]
    fn ssh_gets_port_key_and_one_quoted_word() {
        let options = Options {
            ssh_port: Some(2222),
            ssh_identity_file: Some("my key".into()),
            remote_hvdrun: Some("/opt/it's/hvdrun".into()),
            ..Options::default()
        };
        let command = remote_agent(&Host { name: "me@node1".into(), slots: 1 }, &options).unwrap();
        let args: Vec<_> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
        assert!(args.contains(&"BatchMode=yes"), "{args:?}");
        assert_eq!(args[7..], ["-p", "2222", "-i", "my key", "me@node1", r"exec '/opt/it'\''s/hvdrun' --agent"]);
        let own = Options { ssh_command: Some("sh enter.sh".into()), ..Options::default() };
        let command = remote_agent(&Host { name: "h1".into(), slots: 1 }, &own).unwrap();
        let args: Vec<_> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!((command.get_program().to_str(), &args[..2]), (Some("sh"), &["enter.sh", "h1"][..]));
    }

    #[test]
    fn programs_are_named_by_whole_paths() {
        assert_eq!(absolute_program("train".into()).unwrap(), "train");
        assert_eq!(absolute_program("/bin/train".into()).unwrap(), "/bin/train");
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute_program("./train".into()).unwrap(), here.join("train").as_os_str());
    }
}
