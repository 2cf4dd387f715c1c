//! The public face: a world of ranks and what they do together.

mod affinity;
mod bootstrap;
mod global;
mod objects;
mod solo;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::Config;
use crate::dtype::{DType, Element};
use crate::engine::observe::{Observer, Seat};
use crate::engine::submission::{Allreduce, OpKind, Output, Submission};
use crate::engine::timeline::Timeline;
use crate::engine::{Engine, Handle, Observers};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::topology::Topology;
use crate::transport::thread::ThreadTransport;

pub use global::{
    cross_rank, cross_size, init, init_with, is_initialised, local_rank, local_size, rank, shutdown, size, world,
};

/// What serves large allreduces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A world of one: there is nothing to reduce with.
    Solo,
    /// Memory that the ranks of one host share.
    Shm,
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
            Backend::Tcp => "tcp",
            Backend::Mpi => "mpi",
            Backend::Thread => "thread",
        })
    }
}

/// The ranks that work together, seen from one of them. Clones are the same rank.
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
pub struct World(Arc<Inner>);

struct Inner {
    topology: Topology,
    backend: Backend,
    observers: Arc<Observers>,
    timeline: Mutex<Option<Arc<Timeline>>>,
    /// `None` for a world of one.
    engine: Option<Engine>,
    /// Numbers the operations to which the user gives no name.
    unnamed: std::sync::atomic::AtomicU64,
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
        let run = |transport: ThreadTransport| match bootstrap::thread_rank(transport, config, share) {
            Ok(world) => rank(world),
            Err(error) => panic!("a rank on a thread did not start: {error}"),
        };
        if let Some(path) = &config.timeline {
            drop(std::fs::remove_file(path));
        }
        std::thread::scope(|scope| {
            let ranks = ThreadTransport::world(size).into_iter();
            let threads: Vec<_> = ranks.map(|transport| scope.spawn(|| run(transport))).collect();
            let results = threads.into_iter().map(|thread| thread.join());
            results.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    }

    /// This rank, `0 .. size`.
    pub fn rank(&self) -> usize {
        self.0.topology.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.0.topology.size
    }

    /// This rank among those of its host.
    pub fn local_rank(&self) -> usize {
        self.0.topology.local_rank
    }

    /// Number of ranks on this host.
    pub fn local_size(&self) -> usize {
        self.0.topology.local_size
    }

    /// This rank's host among those that have this local rank.
    pub fn cross_rank(&self) -> usize {
        self.0.topology.cross_rank
    }

    /// Number of hosts that have this local rank.
    pub fn cross_size(&self) -> usize {
        self.0.topology.cross_size
    }

    /// This rank's place in the world.
    pub fn topology(&self) -> &Topology {
        &self.0.topology
    }

    /// What serves large allreduces.
    pub fn backend(&self) -> Backend {
        self.0.backend
    }

    /// Has `observer` told of every station of this rank's tensors from now on; `None` ends that.
    pub fn set_observer(&self, observer: Option<Arc<dyn Observer>>) {
        self.0.observers.set(Seat::User, observer);
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
        *self.0.timeline.lock().unwrap_or_else(PoisonError::into_inner) = Some(timeline.clone());
        self.0.observers.set(Seat::Timeline, Some(timeline));
        Ok(())
    }

    /// Ends the timeline; the part of the file that is this rank's is complete afterwards. Does nothing where there is none.
    pub fn stop_timeline(&self) {
        self.0.observers.set(Seat::Timeline, None);
        if let Some(timeline) = self.0.timeline.lock().unwrap_or_else(PoisonError::into_inner).take() {
            timeline.stop();
        }
    }

    /// Submits an operation; the engine carries it out in the background.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what no rank could do. What goes wrong later is the handle's to tell.
    pub fn submit(&self, submission: Submission) -> Result<Handle> {
        self.hand_in(submission, true)
    }

    /// Combines every rank's `data`, which all get back.
    ///
    /// # Errors
    /// As [`Handle::wait`]; `data` is unspecified then.
    pub fn allreduce<T: Element>(&self, name: &str, data: &mut [T], options: impl Into<Allreduce>) -> Result<()> {
        self.run_borrowed(name, data, OpKind::Allreduce(options.into()))
    }

    /// Gives all ranks the root's `data`, which must have the same length on all.
    ///
    /// # Errors
    /// As [`Handle::wait`]; `data` is unspecified then.
    pub fn broadcast<T: Element>(&self, name: &str, data: &mut [T], root: usize) -> Result<()> {
        self.run_borrowed(name, data, OpKind::Broadcast { root })
    }

    /// Gives all ranks everyone's `data`, by rank. Lengths may differ.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn allgather<T: Element>(&self, name: &str, data: &[T]) -> Result<Vec<T>> {
        self.allgather_async(name, data.to_vec())?.wait()
    }

    /// Returns on no rank before it has been called on every rank.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn barrier(&self) -> Result<()> {
        let submission = self.barrier_submission();
        self.hand_in(submission, false)?.wait().map(drop)
    }

    /// As [`World::allreduce`], in the background.
    ///
    /// # Errors
    /// As [`World::submit`].
    pub fn allreduce_async<T: Element>(
        &self,
        name: &str,
        data: Vec<T>,
        options: impl Into<Allreduce>,
    ) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Allreduce(options.into()))
    }

    /// As [`World::broadcast`], in the background.
    ///
    /// # Errors
    /// As [`World::submit`].
    pub fn broadcast_async<T: Element>(&self, name: &str, data: Vec<T>, root: usize) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Broadcast { root })
    }

    /// As [`World::allgather`], in the background.
    ///
    /// # Errors
    /// As [`World::submit`].
    pub fn allgather_async<T: Element>(&self, name: &str, data: Vec<T>) -> Result<VecHandle<T>> {
        self.run_owned(name, data, OpKind::Allgather)
    }

    /// As [`World::barrier`], in the background.
    ///
    /// # Errors
    /// As [`World::submit`].
    pub fn barrier_async(&self) -> Result<Handle> {
        self.submit(self.barrier_submission())
    }

    /// Fails the world: every operation on every rank ends with an error that gives `cause`.
    pub fn abort(&self, cause: &str) {
        if let Some(engine) = &self.0.engine {
            engine.abort(Error::PeerLost { rank: self.rank(), cause: cause.into() });
        }
    }

    /// Leaves the world in peace: waits until all ranks have called it. Operations that not every rank has submitted by
    /// then end with an error.
    ///
    /// # Errors
    /// What the world was lost to, if it was.
    pub fn shutdown(&self) -> Result<()> {
        let ended = self.0.engine.as_ref().map_or(Ok(()), Engine::shutdown);
        self.stop_timeline();
        ended
    }

    fn hand_in(&self, submission: Submission, flush: bool) -> Result<Handle> {
        submission.validate(self.size())?;
        self.0.observers.submitted(&submission);
        match &self.0.engine {
            Some(engine) => engine.submit(submission, flush),
            None => Ok(Handle::done(Ok(solo::carry_out(submission, &self.0.observers)))),
        }
    }

    fn run_borrowed<T: Element>(&self, name: &str, data: &mut [T], kind: OpKind) -> Result<()> {
        if self.backend() == Backend::Mpi {
            // After a failure MPI may still write to memory that it was given, so it never gets a borrowed one.
            let result = self.run_owned(name, data.to_vec(), kind)?.wait()?;
            data.copy_from_slice(&result);
            return Ok(());
        }
        let bytes = size_of_val(data);
        let pointer = std::ptr::NonNull::from(&mut *data).cast();
        // SAFETY: `data` stays borrowed until `wait` returns, and the engine drops its memory before it completes.
        let input = unsafe { Memory::from_raw_parts(pointer, bytes, None) };
        let submission = Submission {
            name: name.into(),
            kind,
            dtype: T::DTYPE,
            shape: vec![data.len()],
            input,
            output: Output::InPlace,
        };
        self.hand_in(submission, false)?.wait().map(drop)
    }

    fn run_owned<T: Element>(&self, name: &str, data: Vec<T>, kind: OpKind) -> Result<VecHandle<T>> {
        let output = match kind {
            OpKind::Allgather => {
                Output::Allocate(Box::new(|bytes| Memory::from_vec(vec![T::default(); bytes / size_of::<T>()])))
            }
            _ => Output::InPlace,
        };
        let shape = vec![data.len()];
        let submission =
            Submission { name: name.into(), kind, dtype: T::DTYPE, shape, input: Memory::from_vec(data), output };
        Ok(VecHandle { handle: self.submit(submission)?, elements: std::marker::PhantomData })
    }

    fn barrier_submission(&self) -> Submission {
        let number = self.0.unnamed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Submission {
            name: format!("barrier.{number}"),
            kind: OpKind::Barrier,
            dtype: DType::U8,
            shape: vec![0],
            input: Memory::empty(),
            output: Output::InPlace,
        }
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "World(rank {} of {}, {})", self.rank(), self.size(), self.backend())
    }
}

/// An operation on an owned vector under way. Dropping it does not cancel the operation.
pub struct VecHandle<T> {
    handle: Handle,
    elements: std::marker::PhantomData<T>,
}

impl<T: Element> VecHandle<T> {
    /// Whether the operation is done. Never blocks.
    pub fn poll(&self) -> bool {
        self.handle.poll()
    }

    /// Waits for the operation and gives the result.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn wait(self) -> Result<Vec<T>> {
        let completion = self.handle.wait()?;
        // SAFETY: the operation is done.
        Ok(unsafe { completion.output.into_vec() })
    }
}
