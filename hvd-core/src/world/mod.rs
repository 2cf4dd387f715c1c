//! The public face: a world of ranks and what they do together.

mod affinity;
mod agreement;
mod bootstrap;
mod global;
mod grouped;
mod handles;
mod messages;
pub(crate) mod objects;
mod operations;
mod process_set;
mod shared;
mod solo;
mod sparse;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use parking_lot::Mutex;

use crate::config::Config;
use crate::engine::observe::{Observer, Seat};
use crate::engine::timeline::{self, Timeline};
use crate::engine::{Engine, Observers};
use crate::error::{Error, Result};
use crate::shm::ShmGroup;
use crate::topology::Topology;
use crate::transport::thread::ThreadTransport;

pub use global::{
    cross_rank, cross_size, init, init_with, init_with_process_sets, is_initialised, local_rank, local_size,
    mpi_enabled, mpi_threads_supported, rank, shm_enabled, shutdown, size, tcp_enabled, world,
};
pub use handles::{GroupVecHandle, JoinHandle, VecHandle};
pub use process_set::ProcessSet;
pub use shared::{SharedBuffer, SharedHandle};
pub use sparse::SparseHandle;

/// What serves large allreduces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A world of one: there is nothing to reduce with.
    Solo,
    /// Memory that the ranks of one host share.
    Shm,
    /// Memory within each host, the transport between hosts.
    Hierarchical,
    /// TCP connections.
    Tcp,
    /// The MPI plugin.
    Mpi,
    /// Ranks are threads of one process.
    Thread,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backend::Solo => "solo",
            Backend::Shm => "shm",
            Backend::Hierarchical => "hierarchical",
            Backend::Tcp => "tcp",
            Backend::Mpi => "mpi",
            Backend::Thread => "thread",
        })
    }
}

/// The ranks that work together, seen from one of them. Clones are the same rank.
///
/// A world is the [`ProcessSet`] of all ranks, and has all its operations.
///
/// Every rank must submit the same operations under the same names; the order does not matter. Dropping the last clone
/// without [`World::shutdown`] fails the world for all other ranks.
///
/// ```
/// use hvd_core::{ReduceOp, World};
///
/// let sums = World::threads(3, |world| {
///     let mut data = vec![world.rank() as f32; 4];
///     world.allreduce("data", &mut data, ReduceOp::Sum)?;
///     world.shutdown()?;
///     Ok::<_, hvd_core::Error>(data)
/// });
/// for sum in sums {
///     assert_eq!(sum?, [3.0; 4]);
/// }
/// # Ok::<(), hvd_core::Error>(())
/// ```
#[derive(Clone)]
pub struct World(ProcessSet);

/// What all process sets of a rank share.
struct Inner {
    topology: Topology,
    observers: Arc<Observers>,
    timeline: Mutex<Option<Arc<Timeline>>>,
    /// What moves bytes where no memory is shared.
    transport: Backend,
    /// Held while this rank makes a process set.
    founding: Mutex<()>,
    /// `None` for a world of one.
    engine: Option<Engine>,
    /// The memory that all ranks share, if they are on one host.
    shared: Option<Arc<ShmGroup>>,
    /// Numbers the shared buffers.
    shared_buffers: AtomicU64,
}

impl World {
    /// Meets the other ranks, as the launcher's and our own environment variables say; alone where they say nothing.
    ///
    /// # Errors
    /// [`Error::Config`] for variables that make no sense, [`Error::Rendezvous`] where the ranks do not find each other.
    pub fn from_env() -> Result<World> {
        World::with_config(Config::from_env()?)
    }

    /// Meets the other ranks, with settings from `config` and this rank's place from the launcher's variables.
    ///
    /// # Errors
    /// As [`World::from_env`].
    pub fn with_config(config: Config) -> Result<World> {
        bootstrap::world(config)
    }

    /// Runs `rank` once for each of `size` ranks that are threads of this process, and gives what they gave, by rank.
    ///
    /// # Panics
    /// If the closure panics on any rank.
    pub fn threads<R: Send>(size: usize, rank: impl Fn(World) -> R + Sync) -> Vec<R> {
        World::threads_with(size, &Config::default(), rank)
    }

    /// As [`World::threads`], with settings.
    ///
    /// # Panics
    /// If the closure panics on any rank, or if no thread can be started.
    pub fn threads_with<R: Send>(size: usize, config: &Config, rank: impl Fn(World) -> R + Sync) -> Vec<R> {
        World::on_threads(size, config, false, rank)
    }

    /// As [`World::threads_with`], where the ranks share memory as the processes of one host do ([`Backend::Shm`]).
    ///
    /// # Panics
    /// As [`World::threads_with`].
    pub fn threads_sharing<R: Send>(size: usize, config: &Config, rank: impl Fn(World) -> R + Sync) -> Vec<R> {
        World::on_threads(size, config, true, rank)
    }

    fn on_threads<R: Send>(size: usize, config: &Config, share: bool, rank: impl Fn(World) -> R + Sync) -> Vec<R> {
        if let Some(path) = &config.timeline {
            drop(std::fs::remove_file(path));
        }
        let start = |transport| match bootstrap::thread_rank(transport, config, share) {
            Ok(world) => world,
            Err(error) => panic!("a rank on a thread did not start: {error}"),
        };
        // All first start: to a rank that has not, one that leaves at once would be lost before there is a world.
        on_threads_each(on_threads_each(ThreadTransport::world(size), start), rank)
    }

    /// This rank among those of its host.
    pub fn local_rank(&self) -> usize {
        self.inner().topology.local_rank
    }

    /// Number of ranks on this host.
    pub fn local_size(&self) -> usize {
        self.inner().topology.local_size
    }

    /// This rank's host among those that have this local rank.
    pub fn cross_rank(&self) -> usize {
        self.inner().topology.cross_rank
    }

    /// Number of hosts that have this local rank.
    pub fn cross_size(&self) -> usize {
        self.inner().topology.cross_size
    }

    /// This rank's place in the world.
    pub fn topology(&self) -> &Topology {
        &self.inner().topology
    }

    /// Whether ranks share memory: all of them, or those of each host.
    pub fn shm_enabled(&self) -> bool {
        matches!(self.backend(), Backend::Shm | Backend::Hierarchical)
    }

    /// Whether TCP moves bytes between ranks, where they share no memory.
    pub fn tcp_enabled(&self) -> bool {
        self.inner().transport == Backend::Tcp
    }

    /// Whether MPI moves bytes between ranks, where they share no memory.
    pub fn mpi_enabled(&self) -> bool {
        self.inner().transport == Backend::Mpi
    }

    /// Whether several threads may call MPI, one at a time. An MPI that does not let them is refused at the start, so this says
    /// the same as [`World::mpi_enabled`].
    pub fn mpi_threads_supported(&self) -> bool {
        self.mpi_enabled()
    }

    /// Has `observer` told of every station of this rank's tensors from now on; `None` ends that.
    pub fn set_observer(&self, observer: Option<Arc<dyn Observer>>) {
        self.inner().observers.set(Seat::User, observer);
    }

    /// Starts to write what happens to this rank's tensors to a file that Perfetto opens; see [`crate::engine::timeline`].
    /// The ranks of a host write to one file, each from its own call on; what is in the file stays. `mark_rounds` shows the
    /// rounds of negotiation too. A timeline that is being written ends.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn start_timeline(&self, path: impl AsRef<Path>, mark_rounds: bool) -> Result<()> {
        self.stop_timeline();
        let backend = self.backend().to_string();
        let timeline = Arc::new(Timeline::start(path.as_ref(), mark_rounds, self.topology(), &backend)?);
        *self.inner().timeline.lock() = Some(timeline.clone());
        self.inner().observers.set(Seat::Timeline, Some(timeline));
        Ok(())
    }

    /// As [`World::start_timeline`], in a file that is made anew. All ranks must call it.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be replaced or written; a lost world.
    pub fn start_timeline_anew(&self, path: impl AsRef<Path>, mark_rounds: bool) -> Result<()> {
        let removed = match self.local_rank() {
            0 => timeline::remove(path.as_ref(), self.topology()),
            _ => Ok(()),
        };
        self.barrier()?; // nobody writes into a file that is about to go
        removed?;
        self.start_timeline(path, mark_rounds)
    }

    /// Whether a timeline is being written.
    pub fn has_timeline(&self) -> bool {
        self.inner().timeline.lock().is_some()
    }

    /// Ends the timeline; the part of the file that is this rank's is complete afterwards. Does nothing where there is none.
    pub fn stop_timeline(&self) {
        self.inner().observers.set(Seat::Timeline, None);
        if let Some(timeline) = self.inner().timeline.lock().take() {
            timeline.stop();
        }
    }

    /// Marks in the timeline, if one is being written, that the program did `name` from `started` until now: a slice in
    /// the row `row`, above those of the tensors. Slices of a row may hold each other, but not overlap otherwise.
    pub fn mark_timeline(&self, row: &'static str, name: &'static str, started: Instant) {
        if let Some(timeline) = &*self.inner().timeline.lock() {
            timeline.slice(row, name, started);
        }
    }

    /// Fails the world: every operation on every rank ends with an error that gives `cause`.
    pub fn abort(&self, cause: &str) {
        if let Some(engine) = &self.inner().engine {
            engine.abort(Error::PeerLost { rank: self.rank(), cause: cause.into() });
        }
    }

    /// Leaves the world in peace: waits until all ranks have called it. Operations that not every rank has submitted by
    /// then end with an error.
    ///
    /// # Errors
    /// What the world was lost to, if it was.
    pub fn shutdown(&self) -> Result<()> {
        let ended = self.inner().engine.as_ref().map_or(Ok(()), Engine::shutdown);
        self.stop_timeline();
        ended
    }
}

impl World {
    fn inner(&self) -> &Inner {
        self.0.world()
    }

    /// Makes a process set of some of the world's ranks, in any order. `None` if this rank is none of them.
    ///
    /// To be called by the set's members alone; it returns once all of them have called it with the same ranks. A rank
    /// makes one set at a time, so ranks that are in several sets make them in the same order. The ranks of another call
    /// with the same ranks are another set, independent of the first.
    ///
    /// # Errors
    /// [`Error::Invalid`] for ranks that there are not or that come twice; [`Error::Mismatch`] on all concerned where ranks
    /// wait for each other in different sets, after which they may try again.
    pub fn process_set(&self, ranks: &[usize]) -> Result<Option<ProcessSet>> {
        let mut members = ranks.to_vec();
        members.sort_unstable();
        let twice = members.windows(2).any(|pair| pair[0] == pair[1]);
        if twice || members.last().is_none_or(|&last| last >= self.size()) {
            let size = self.size();
            return Err(Error::Invalid(format!("{ranks:?} are not different ranks of a world of {size}")));
        }
        match members.contains(&self.rank()) {
            true => self.0.found(members).map(Some),
            false => Ok(None),
        }
    }
}

impl std::ops::Deref for World {
    type Target = ProcessSet;

    fn deref(&self) -> &ProcessSet {
        &self.0
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "World(rank {} of {}, {})", self.rank(), self.size(), self.backend())
    }
}

/// Runs `body` for each item on a thread of its own, and gives what they gave, in order.
///
/// # Panics
/// If it panics on any of them.
fn on_threads_each<T: Send, R: Send>(items: Vec<T>, body: impl Fn(T) -> R + Sync) -> Vec<R> {
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || body(item))).collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}
