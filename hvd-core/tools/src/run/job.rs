//! A job from its start to its end, as `hvdrun` sees it.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use hvd_core::topology::listed;
use signal_hook::consts::{SIGKILL, SIGTERM, SIGUSR1, SIGUSR2};

use super::connection::{Connection, News, absolute_program};
use super::environment::{self, DECIDED};
use super::events::{self, Event};
use super::message::{End, FromAgent, Order, Reserve, ToAgent, Variable};
use super::options::Options;
use super::output::{Outputs, PATIENCE, Prefix};
use super::plan::{self, Plan};
use super::report::{self, Ends, signal_code, signal_name};

/// How long the other ranks may go on after the first failure, to say what they have to say.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(3);

/// After this time it is said who is waited for, and again and again.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// How long processes are awaited that were killed: it is the kernel's turn, or a host is out of reach.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A job under way.
pub struct Job {
    plan: Plan,
    options: Options,
    command: Vec<OsString>,
    /// The variables that make the ranks one job.
    identity: Vec<Variable>,
    agents: Vec<Agent>,
    events: Receiver<Event>,
    /// Told when rank 0 has taken a piece of input.
    taken: Sender<()>,
    outputs: Outputs,
    ends: Ends,
    started: Instant,
    next_progress: Instant,
    /// Signals to send at their times; the end of the last is the end of patience.
    schedule: VecDeque<(Instant, Step)>,
    /// The signal that ended the job.
    interrupted: Option<i32>,
    /// What of hvdrun's own part went wrong first, and the exit code for that.
    failure: Option<(u8, String)>,
    gave_up: bool,
}

#[derive(Clone, Copy)]
enum Step {
    Signal(i32),
    GiveUp,
}

/// What is known of a host's agent.
struct Agent {
    connection: Connection,
    greeted: bool,
    launched: bool,
    gone: bool,
}

impl Job {
    /// Starts the agents of all hosts.
    ///
    /// # Errors
    /// If one cannot be started, or the output files cannot be made.
    pub fn start(plan: Plan, options: Options, mut command: Vec<OsString>) -> Result<Job> {
        command[0] = absolute_program(std::mem::take(&mut command[0]))?;
        let prefix = Prefix {
            tag: options.tag_output.unwrap_or(true),
            timestamp: options.prefix_output_with_timestamp.unwrap_or(false),
        };
        let outputs = Outputs::new(prefix, options.output_filename.as_deref(), plan.size)?;
        let mut identity = environment::identity()?.to_vec();
        identity.extend(options.variables()?.into_iter().map(|(name, value)| environment::variable(name, value)));
        let (queue, events) = sync_channel(events::QUEUE);
        events::bring_signals(queue.clone())?;
        let open = |(at, (host, _)): (usize, &(_, _))| Agent::open(host, &options, queue.clone(), at);
        let agents = plan.hosts.iter().enumerate().map(open).collect::<Result<_>>()?;
        let (taken, started) = (events::bring_input(queue), Instant::now());
        Ok(Job {
            plan,
            options,
            command,
            identity,
            agents,
            events,
            taken,
            outputs,
            ends: Ends::default(),
            started,
            next_progress: started + PROGRESS_INTERVAL,
            schedule: VecDeque::new(),
            interrupted: None,
            failure: None,
            gave_up: false,
        })
    }

    /// Runs the job to its end. Gives the exit code.
    ///
    /// # Errors
    /// If output cannot be written.
    pub fn run(mut self) -> Result<u8> {
        match self.plan.is_single_host() {
            true => self.launch(None)?,
            false => self.agents[0].connection.say(ToAgent::Reserve(Reserve {
                interface: self.options.network_interface.clone(),
                toward: self.plan.hosts[1].0.address_elsewhere(),
            })),
        }
        while !self.is_over() {
            match self.events.recv_timeout(self.patience()?) {
                Ok(event) => self.follow(event)?,
                Err(RecvTimeoutError::Timeout) => self.outputs.flush()?,
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.keep_time()?;
        }
        self.outputs.flush()?;
        Ok(self.conclude())
    }

    /// Whether no rank runs any more.
    fn is_over(&self) -> bool {
        let ending = self.failure.is_some() || self.interrupted.is_some();
        let quiet = |(agent, (_, ranks)): (&Agent, &(_, Vec<hvd_core::Topology>))| {
            agent.gone
                || (ending && !(agent.greeted && agent.launched))
                || ranks.iter().all(|place| self.ends.contains(place.rank))
        };
        self.gave_up || self.agents.iter().zip(&self.plan.hosts).all(quiet)
    }

    fn follow(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Signal(number) => self.interrupt(number),
            Event::Input(bytes) => self.agents[0].connection.say(ToAgent::Stdin(bytes)),
            Event::News(at, News::Greeted) => {
                self.agents[at].greeted = true;
                self.note(|job| format!("{} answers", job.plan.hosts[at].0.name));
            }
            Event::News(at, News::Complained(line)) => self.say(&format!("{}: {line}", self.plan.hosts[at].0.name)),
            Event::News(at, News::Gone(how)) => self.gone(at, &how),
            Event::News(at, News::Said(message)) => self.hear(at, message)?,
        }
        Ok(())
    }

    fn hear(&mut self, at: usize, message: FromAgent) -> Result<()> {
        match message {
            FromAgent::Reserved(address) => {
                self.note(|_| format!("the ranks meet at {address}"));
                self.launch(Some(address))?;
            }
            FromAgent::Started { rank, pid } => {
                self.note(|job| format!("rank {rank} is process {pid} on {}", job.plan.host_of(rank)));
            }
            FromAgent::Output { rank, stream, bytes } => self.outputs.take(rank, stream, &bytes)?,
            // Nobody waits where the input has ended.
            FromAgent::StdinTaken => drop(self.taken.send(())),
            FromAgent::Ended { rank, end } => self.ended(rank, end),
            FromAgent::Failed { code, text } => {
                self.agents[at].gone = true;
                self.fail(code, format!("{}: {text}", self.plan.hosts[at].0.name));
            }
        }
        Ok(())
    }

    /// Has all agents start their ranks.
    fn launch(&mut self, rendezvous: Option<std::net::SocketAddr>) -> Result<()> {
        let (folder, grace) = (std::env::current_dir()?, self.options.grace()?);
        for (agent, (host, places)) in self.agents.iter_mut().zip(&self.plan.hosts) {
            let mut variables = if host.is_here() { Vec::new() } else { environment::portable() };
            variables.extend(self.identity.iter().cloned());
            let of_rank =
                |place| plan::variables(place).map(|(name, value)| environment::variable(name, value.to_string()));
            agent.launched = true;
            agent.connection.say(ToAgent::Launch(Box::new(Order {
                command: self.command.iter().map(|word| word.clone().into_vec()).collect(),
                folder: folder.clone(),
                variables,
                removed: DECIDED.map(String::from).to_vec(),
                ranks: places.iter().map(|place| (place.rank, of_rank(place).to_vec())).collect(),
                rendezvous,
                interface: self.options.network_interface.clone(),
                grace_ms: grace.as_millis() as u64,
            })));
        }
        self.note(Job::order);
        Ok(())
    }

    /// What is started, and with which variables, but for the secret.
    fn order(&self) -> String {
        let words = self.command.iter().map(|word| word.to_string_lossy());
        let told = self.identity.iter().filter(|(name, _)| name != b"HVD_SECRET");
        let told =
            told.map(|(name, value)| format!("{}={}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)));
        told.map(Cow::Owned).chain(words).collect::<Vec<_>>().join(" ")
    }

    fn ended(&mut self, rank: usize, end: End) {
        self.ends.push(rank, end);
        self.note(|_| format!("rank {rank}: {end}"));
        if !end.is_success() {
            self.wind_down(LAST_WORDS_TIMEOUT);
        }
    }

    /// Lets the ranks go on for a time, then asks them to end, then kills them. Does nothing where that has begun.
    fn wind_down(&mut self, time: Duration) {
        if self.schedule.is_empty() {
            let asked = Instant::now() + time;
            self.schedule.push_back((asked, Step::Signal(SIGTERM)));
            self.kill_after(asked);
        }
    }

    fn kill_after(&mut self, asked: Instant) {
        let killed = asked + self.options.grace().unwrap_or_default();
        self.schedule.push_back((killed, Step::Signal(SIGKILL)));
        self.schedule.push_back((killed + KILL_TIMEOUT, Step::GiveUp));
    }

    /// Passes a signal on. All but the user's own ask to end; who asks twice means it.
    fn interrupt(&mut self, number: i32) {
        if matches!(number, SIGUSR1 | SIGUSR2) {
            return self.tell_all(number);
        }
        if self.interrupted.replace(number).is_some() {
            return self.tell_all(SIGKILL);
        }
        self.tell_all(number);
        self.schedule.clear();
        self.kill_after(Instant::now());
    }

    fn tell_all(&self, signal: i32) {
        self.agents.iter().for_each(|agent| agent.connection.say(ToAgent::Signal(signal)));
    }

    fn fail(&mut self, code: u8, text: String) {
        // What follows a failed rank, or the user's wish, is not the cause.
        if self.failure.is_none() && self.schedule.is_empty() {
            self.failure = Some((code, text));
        }
        self.wind_down(Duration::ZERO);
    }

    fn gone(&mut self, at: usize, how: &str) {
        let ranks: Vec<_> = self.plan.hosts[at].1.iter().map(|place| place.rank).collect();
        let left: Vec<_> = ranks.into_iter().filter(|rank| !self.ends.contains(*rank)).collect();
        let (agent, name) = (&mut self.agents[at], &self.plan.hosts[at].0.name);
        agent.gone = true;
        if left.is_empty() {
            return;
        }
        let text = match agent.greeted {
            true => format!("lost the host {name} with {}: {how}", listed(left)),
            false => format!(
                "cannot start {} on the host {name}: {how}; `ssh {name} true` must work without a password, and hvdrun must be \
                 there at the same path as here (or where --remote-hvdrun says)",
                listed(left)
            ),
        };
        self.fail(report::OWN_FAILURE, text);
    }

    /// How long nothing need be done if nothing happens.
    fn patience(&self) -> Result<Duration> {
        let now = Instant::now();
        let mut wait = Duration::from_secs(3600);
        if self.outputs.has_begun() {
            wait = wait.min(PATIENCE);
        }
        if !self.silent_hosts().is_empty() {
            let deadline = self.next_progress.min(self.started + self.options.start_timeout()?);
            wait = wait.min(deadline.saturating_duration_since(now));
        }
        if let Some((at, _)) = self.schedule.front() {
            wait = wait.min(at.saturating_duration_since(now));
        }
        Ok(wait)
    }

    /// Does what is due.
    fn keep_time(&mut self) -> Result<()> {
        let now = Instant::now();
        while let Some((_, step)) = self.schedule.front().copied().filter(|(at, _)| *at <= now) {
            self.schedule.pop_front();
            match step {
                Step::Signal(number) => self.tell_all(number),
                Step::GiveUp => self.gave_up = true,
            }
        }
        let silent = self.silent_hosts();
        if silent.is_empty() || self.failure.is_some() {
            return Ok(());
        }
        let limit = self.options.start_timeout()?;
        if now >= self.started + limit {
            self.fail(
                report::OWN_FAILURE,
                format!("no answer in {limit:?} from {} (--start-timeout)", silent.join(", ")),
            );
        } else if now >= self.next_progress {
            self.next_progress = now + PROGRESS_INTERVAL;
            self.say(&format!("still waiting for {}", silent.join(", ")));
        }
        Ok(())
    }

    /// The hosts whose agents have not greeted, with their ranks.
    fn silent_hosts(&self) -> Vec<String> {
        let silent = self.agents.iter().zip(&self.plan.hosts).filter(|(agent, _)| !agent.greeted && !agent.gone);
        let described = silent.map(|(_, (host, places))| {
            format!("{} ({})", host.name, listed(places.iter().map(|place| place.rank).collect()))
        });
        described.collect()
    }

    /// Says how it ended; gives the exit code.
    fn conclude(&mut self) -> u8 {
        if let Some(number) = self.interrupted {
            self.say(&format!("ended by {}", signal_name(number)));
            return signal_code(number);
        }
        if let Some((code, text)) = self.failure.take() {
            self.say(&text);
            return code;
        }
        let Some((rank, end)) = self.ends.first_failure(|rank| self.outputs.last_words(rank).join("\n")) else {
            return 0;
        };
        self.say(&format!("rank {rank} on {} failed first: {end}", self.plan.host_of(rank)));
        let words = self.outputs.last_words(rank);
        if !words.is_empty() {
            self.say("the last that it said on stderr:");
            words.iter().for_each(|line| eprintln!("    {line}"));
        }
        self.ends.followers(rank).iter().for_each(|text| self.say(&format!("then {text}")));
        end.exit_code()
    }

    fn note(&mut self, text: impl FnOnce(&Job) -> String) {
        if self.options.verbose == Some(true) {
            let text = text(self);
            self.say(&text);
        }
    }

    fn say(&mut self, text: &str) {
        self.outputs.end_line();
        eprintln!("hvdrun: {text}");
    }
}

impl Agent {
    fn open(
        host: &super::hosts::Host,
        options: &Options,
        queue: std::sync::mpsc::SyncSender<Event>,
        at: usize,
    ) -> Result<Agent> {
        let connection = Connection::open(host, options, queue, at)?;
        Ok(Agent { connection, greeted: false, launched: false, gone: false })
    }
}
