//! A rank is killed, stopped or cut off at a random moment: the others end in time, each with an error that names it, and
//! nothing is left behind. The seed is printed; `HVD_TEST_SEED` repeats it, `HVD_TEST_FULL` does ten times as many.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hvd_tests::{Cut, Finished, Hosts, Job, Launcher, Running, binary, mpi_plugin, seed};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Pid, Signal};

/// Ranks that have not met wait so long for each other.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// Silence is borne so long.
const PEER_TIMEOUT: Duration = Duration::from_secs(3);

/// From a death, or from the end of a silence, to the end of the last of the others.
const LIMIT: Duration = Duration::from_secs(10);

/// Jobs at a time: they wait more than they compute.
const PARALLEL: usize = 3;

/// What happens to a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Kill,
    Stop,
    Cut(Cut),
}

/// One fault, all of it drawn from the seed.
#[derive(Clone, Debug)]
struct Fault {
    kind: Kind,
    shm: bool,
    phase: &'static str,
    ranks: usize,
    victim: usize,
    /// Whether the ranks have met before the delay begins.
    met: bool,
    /// From when the ranks are in the phase.
    delay: Duration,
    /// In the phase [`SHUTDOWN`]: how much later than the others the victim wants to.
    leave_after: Duration,
}

/// Where the ranks are when it happens.
const PHASES: [&str; 5] = ["start", "negotiation", "copy", "wire", SHUTDOWN];

/// All ranks have asked for it, and say goodbye.
const SHUTDOWN: &str = "shutdown";

impl Fault {
    fn draw(random: &mut ChaCha8Rng, kinds: &[Kind], number: usize) -> Fault {
        let ranks = random.random_range(2..=4);
        let phase = PHASES[number % PHASES.len()];
        let kind = kinds[(number / PHASES.len() + number) % kinds.len()];
        // A shutdown is over in a moment, and it takes another to cut somebody off.
        let (longest_delay, longest_lead) = match (phase, kind) {
            (SHUTDOWN, Kind::Cut(_)) => (100, 8000),
            (SHUTDOWN, _) => (4000, 300),
            _ => (200_000, 1),
        };
        Fault {
            kind,
            shm: random.random(),
            phase,
            ranks,
            victim: random.random_range(0..ranks),
            met: phase != "start" || random.random(),
            delay: Duration::from_micros(random.random_range(0..longest_delay)),
            leave_after: Duration::from_micros(random.random_range(0..longest_lead)),
        }
    }

    /// The ranks, whose shutdown waits for the file `go`.
    fn job(&self, hosts: Option<Arc<Hosts>>, go: &Path) -> Job {
        let args: Vec<OsString> = match self.phase {
            SHUTDOWN => self.farewell(hosts.as_deref(), go),
            phase => ["busy", "--phase", phase].map(OsString::from).into(),
        };
        let job = Job::new(binary("hvd-worker"), self.ranks)
            .args(args)
            .var("HVD_SHM", u8::from(self.shm))
            .var("HVD_START_TIMEOUT", START_TIMEOUT.as_secs())
            .var("HVD_PEER_TIMEOUT", PEER_TIMEOUT.as_secs());
        match hosts {
            Some(hosts) => job.hosts(hosts),
            None => job,
        }
    }

    /// A shutdown is too short to be hit from outside: the victim does it to itself.
    fn farewell(&self, hosts: Option<&Hosts>, go: &Path) -> Vec<OsString> {
        let blow = match self.kind {
            Kind::Kill => "KILL".into(),
            Kind::Stop => "STOP".into(),
            Kind::Cut(how) => hosts.expect("hosts").cutting(self.victim, how),
        };
        let [victim, delay, leave_after] = [self.victim as u128, self.delay.as_micros(), self.leave_after.as_micros()]
            .map(|number| number.to_string());
        let flags = ["--victim", &victim, "--blow-after-us", &delay, "--leave-after-us", &leave_after, "--blow", &blow];
        let mut args = ["farewell", "--until"].map(OsString::from).to_vec();
        args.push(go.into());
        args.extend(flags.map(OsString::from));
        args
    }

    /// Waits for the moment, and makes it happen.
    fn strike(&self, hosts: Option<Arc<Hosts>>) {
        let folder = tempfile::tempdir().expect("a folder");
        let go = folder.path().join("go");
        let mut running = self.job(hosts.clone(), &go).start();
        assert!(!self.met || running.wait_for("busy"), "the job ended by itself:\n{}", running.stderr());
        if self.phase != SHUTDOWN {
            std::thread::sleep(self.delay); // Somewhere within the phase; not to wait for anything.
        }
        let traces = Traces::of(&running, self.ranks);
        let struck = Instant::now();
        match self.kind {
            _ if self.phase == SHUTDOWN => std::fs::write(&go, "").expect("a file"),
            Kind::Kill => running.kill(self.victim),
            Kind::Stop => running.signal(self.victim, Signal::STOP),
            Kind::Cut(how) => hosts.as_ref().expect("hosts").cut(self.victim, how),
        }
        running.wait_for_ends((0..self.ranks).filter(|&rank| rank != self.victim));
        let took = struck.elapsed();
        running.signal(self.victim, Signal::CONT);
        let finished = running.wait();
        drop(hosts); // Their network has to last until here.
        let silence = if self.kind == Kind::Kill { Duration::ZERO } else { PEER_TIMEOUT };
        let start = if self.phase == "start" { START_TIMEOUT } else { Duration::ZERO };
        assert!(took < LIMIT + silence + start, "it took {took:?}");
        self.check_ends(&finished);
        traces.assert_gone();
    }

    /// Every other rank names the victim, unless it had heard its goodbye.
    fn check_ends(&self, finished: &Finished) {
        let may_part = self.phase == SHUTDOWN;
        if !may_part {
            finished.assert_failure();
        }
        for rank in (0..self.ranks).filter(|&rank| rank != self.victim) {
            let parted = may_part && finished.statuses[rank].success();
            let text = &finished.complaints[rank];
            let all = finished.complaints.join("\n---\n");
            let named = parted || names(text, self.victim);
            assert!(named, "rank {rank} does not name rank {}; all said:\n{all}", self.victim);
        }
    }
}

/// Whether an error names a rank, alone or in a list.
fn names(text: &str, rank: usize) -> bool {
    let number = rank.to_string();
    let begins_with_it = |rest: &str| rest.split(|c: char| !c.is_ascii_digit()).next() == Some(&number);
    let listed = |rest: &str| rest.split(']').next().is_some_and(|list| list.split(", ").any(|item| item == number));
    match text.split_once("lost rank ") {
        Some((_, rest)) => begins_with_it(rest),
        None => text.split("rank ").skip(1).any(begins_with_it) || text.split('[').skip(1).any(listed),
    }
}

/// What the processes of a job hold in the system.
struct Traces {
    processes: Vec<Pid>,
    /// The kernel's numbers of their sockets.
    sockets: Vec<String>,
}

impl Traces {
    fn of(running: &Running, ranks: usize) -> Traces {
        let processes: Vec<_> = (0..ranks).map(|rank| running.pid(rank)).collect();
        let files = |pid: &Pid| std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).into_iter().flatten();
        let targets =
            processes.iter().flat_map(files).flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
        let socket = |target: std::path::PathBuf| {
            let number = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_string();
            Some(number)
        };
        let sockets = targets.filter_map(socket).collect();
        Traces { processes, sockets }
    }

    fn assert_gone(&self) {
        for pid in &self.processes {
            assert!(rustix::process::test_kill_process(*pid).is_err(), "process {pid:?} is still there");
        }
        // Names of other programs' sockets need not be text.
        let table = std::fs::read("/proc/net/unix").expect("the list of Unix sockets");
        let table = String::from_utf8_lossy(&table);
        let left = |socket: &&String| table.lines().any(|line| line.split_whitespace().nth(6) == Some(socket.as_str()));
        let left: Vec<_> = self.sockets.iter().filter(left).collect();
        assert!(left.is_empty(), "sockets {left:?} are still there");
        let segments = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        let ours: Vec<_> =
            segments.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().contains("hvd")).collect();
        assert!(ours.is_empty(), "{ours:?} are left in shared memory");
    }
}

/// Draws `count` faults, ten times as many where time does not matter, and has each happen, some at a time.
fn rain(count: usize, kinds: &[Kind], strike: impl Fn(&Fault) + Sync) {
    let count = if std::env::var_os("HVD_TEST_FULL").is_some() { 10 * count } else { count };
    let mut random = ChaCha8Rng::seed_from_u64(seed());
    let faults: Vec<_> = (0..count).map(|number| Fault::draw(&mut random, kinds, number)).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
            eprintln!("{fault:?}");
            strike(fault);
        }
    };
    std::thread::scope(|scope| (0..PARALLEL).for_each(|_| drop(scope.spawn(work))));
}

#[test]
fn a_rank_killed_or_stopped_at_a_random_moment_is_named_by_all_others() {
    rain(15, &[Kind::Kill, Kind::Stop], |fault| fault.strike(None));
}

#[test]
fn a_rank_cut_off_from_the_network_is_named_by_all_others() {
    if Hosts::new(1).is_none() {
        return;
    }
    let kinds = [Kind::Cut(Cut::Cable), Kind::Cut(Cut::Card)];
    rain(5, &kinds, |fault| fault.strike(Some(Arc::new(Hosts::new(fault.ranks).expect("hosts")))));
}

/// Under `mpirun` the data goes over MPI, the heartbeats do not.
#[test]
fn a_rank_stopped_under_mpirun_ends_the_job() {
    let Some(plugin) = mpi_plugin().filter(|_| Launcher::OpenMpi.is_available()) else { return };
    let job = Job::new(binary("hvd-worker"), 3).args(["busy", "--phase", "wire"]).launcher(Launcher::OpenMpi);
    let job = job.var("HVD_SHM", 0).var("HVD_TRANSPORT", "mpi").var("HVD_MPI_PLUGIN", plugin.display());
    let mut running = job.var("HVD_PEER_TIMEOUT", PEER_TIMEOUT.as_secs()).start();
    assert!(running.wait_for("rank 1 is process "), "the job ended by itself:\n{}", running.stderr());
    let process = running.process_of(1).expect("a process");
    rustix::process::kill_process(process, Signal::STOP).expect("a process to stop");
    let finished = running.wait();
    finished.assert_failure();
    assert!(finished.stderr.contains("lost rank 1: it has given no sign of life"), "{}", finished.stderr);
}
