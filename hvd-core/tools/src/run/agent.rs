//! The agent: the part of `hvdrun` that runs on each host, starts the ranks there and watches over them.
//!
//! It hears from `hvdrun` on stdin and answers on stdout, directly or through `ssh`. When its stdin ends, `hvdrun` or the
//! connection is gone, and it ends its ranks; when it is killed itself, the kernel does so. Each rank has a process group of
//! its own, and what it leaves behind in it is killed after it.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::process::ChildStdin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::address;
use super::message::{self, FromAgent, GREETING, Order, ToAgent};
use super::process::{Ranks, StartError};
use super::report;

/// Messages to `hvdrun`, from all threads.
#[derive(Clone)]
pub struct Mouth(Arc<Mutex<io::Stdout>>);

impl Mouth {
    /// Says something. That nobody listens any more is noticed on stdin.
    pub fn say(&self, message: FromAgent) {
        let _ = message::send(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), &message);
    }
}

/// Serves `hvdrun` until it is gone or all ranks have ended and it says no more.
///
/// # Errors
/// For bytes on stdin that are none of its messages.
pub fn serve() -> Result<()> {
    let mouth = Mouth(Arc::new(Mutex::new(io::stdout())));
    io::stdout().write_all(GREETING.as_bytes()).and_then(|()| io::stdout().flush()).context("greeting hvdrun")?;
    let mut agent = Agent { mouth, port: None, ranks: None, stdin: None, grace: Duration::ZERO };
    let mut input = io::stdin().lock();
    let heard = loop {
        match message::receive(&mut input) {
            Ok(Some(message)) => agent.follow(message),
            Ok(None) => break Ok(()),
            Err(error) => break Err(error).context("a message of hvdrun"),
        }
    };
    agent.leave();
    heard
}

struct Agent {
    mouth: Mouth,
    /// Keeps the port where rank 0 will listen from being given to others.
    port: Option<OwnedFd>,
    ranks: Option<Ranks>,
    /// Bytes for rank 0.
    stdin: Option<Sender<Vec<u8>>>,
    grace: Duration,
}

impl Agent {
    fn follow(&mut self, message: ToAgent) {
        match message {
            ToAgent::Reserve(wish) => match address::reserve(&wish) {
                Ok((address, port)) => {
                    self.port = Some(port);
                    self.mouth.say(FromAgent::Reserved(address));
                }
                Err(error) => self.fail(report::OWN_FAILURE, &error),
            },
            ToAgent::Launch(order) => self.launch(*order),
            ToAgent::Signal(number) => self.signal(number),
            ToAgent::Stdin(bytes) => {
                // An end of the input is the end of the channel.
                match bytes.is_empty() {
                    true => self.stdin = None,
                    false => drop(self.stdin.as_ref().map(|stdin| stdin.send(bytes))),
                }
            }
        }
    }

    fn launch(&mut self, order: Order) {
        self.grace = Duration::from_millis(order.grace_ms);
        let started = match order.interface.as_deref().map(address::of_interface).transpose() {
            Ok(bind) => Ranks::start(&order, bind, &self.mouth),
            Err(error) => Err(StartError { code: report::OWN_FAILURE, error }),
        };
        match started {
            Ok((ranks, stdin)) => {
                self.ranks = Some(ranks);
                self.stdin = stdin.map(|stdin| feed(stdin, self.mouth.clone()));
            }
            Err(StartError { code, error }) => self.fail(code, &error),
        }
    }

    fn signal(&self, number: i32) {
        if let (Some(ranks), Some(signal)) = (&self.ranks, Signal::from_named_raw(number)) {
            ranks.signal(signal);
        }
    }

    fn fail(&self, code: u8, error: &anyhow::Error) {
        self.mouth.say(FromAgent::Failed { code, text: format!("{error:#}") });
    }

    /// Ends what still runs.
    fn leave(&self) {
        if let Some(ranks) = &self.ranks {
            ranks.end(self.grace);
        }
    }
}

/// Writes to a rank's stdin on a thread of its own, as the rank may be slow to read.
fn feed(mut stdin: ChildStdin, mouth: Mouth) -> Sender<Vec<u8>> {
    let (sender, receiver): (Sender<Vec<u8>>, Receiver<Vec<u8>>) = channel();
    std::thread::spawn(move || {
        for bytes in receiver {
            // A rank that has closed its stdin wants no more; the rest is dropped.
            let _ = stdin.write_all(&bytes);
            mouth.say(FromAgent::StdinTaken);
        }
    });
    sender
}
