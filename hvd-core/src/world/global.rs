//! One world for the whole process, as Horovod's users know it.

use std::sync::Once;

use parking_lot::Mutex;

use super::{ProcessSet, World};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::logging;

static WORLD: Mutex<Option<World>> = Mutex::new(None);

/// What a rank that panicked ends with, as Rust's own runtime does.
const PANIC_EXIT_CODE: i32 = 101;

/// Meets the other ranks (see [`World::from_env`]) and makes that world the process's. A second call gives the same world.
///
/// Where the program has no `tracing` subscriber, the runtime logs to stderr (`HVD_LOG_LEVEL`).
///
/// From then on a panic on any thread tells the other ranks its message and ends the process with code 101, so that no rank
/// waits for one that is half dead.
///
/// # Errors
/// As [`World::from_env`].
pub fn init() -> Result<World> {
    init_with(Config::from_env)
}

/// As [`init`], with settings from `config`, which is called only where the world is not there yet.
///
/// # Errors
/// As [`World::with_config`], and what `config` gives.
pub fn init_with(config: impl FnOnce() -> Result<Config>) -> Result<World> {
    let mut slot = WORLD.lock();
    if let Some(world) = &*slot {
        return Ok(world.clone());
    }
    let config = config()?;
    logging::to_stderr(&config);
    let world = World::with_config(config)?;
    *slot = Some(world.clone());
    install_panic_hook();
    Ok(world)
}

/// As [`init`], and makes process sets, which all ranks must list alike. Gives each of them, or `None` where this rank is none of its
/// ranks; see [`World::process_set`].
///
/// # Errors
/// As [`init`] and [`World::process_set`].
pub fn init_with_process_sets<R: AsRef<[usize]>>(sets: impl IntoIterator<Item = R>) -> Result<Vec<Option<ProcessSet>>> {
    let world = init()?;
    sets.into_iter().map(|ranks| world.process_set(ranks.as_ref())).collect()
}

/// Leaves the process's world in peace; see [`World::shutdown`]. Does nothing where there is none. [`init`] may be called
/// again.
///
/// # Errors
/// What the world was lost to, if it was.
pub fn shutdown() -> Result<()> {
    let world = WORLD.lock().take();
    world.map_or(Ok(()), |world| world.shutdown())
}

/// Whether the process has a world.
pub fn is_initialised() -> bool {
    WORLD.lock().is_some()
}

/// The process's world.
///
/// # Errors
/// [`Error::NotInitialised`] before [`init`].
pub fn world() -> Result<World> {
    WORLD.lock().clone().ok_or(Error::NotInitialised)
}

macro_rules! queries {
    ($($(#[$doc:meta])* $name:ident: $type:ty),* $(,)?) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// [`Error::NotInitialised`] before [`init`].
        pub fn $name() -> Result<$type> {
            world().map(|world| world.$name())
        }
    )*};
}

queries!(
    /// This rank, `0 .. size`.
    rank: usize,
    /// Number of ranks.
    size: usize,
    /// This rank among those of its host.
    local_rank: usize,
    /// Number of ranks on this host.
    local_size: usize,
    /// This rank's host among those that have this local rank.
    cross_rank: usize,
    /// Number of hosts that have this local rank.
    cross_size: usize,
    /// Whether ranks share memory.
    shm_enabled: bool,
    /// Whether TCP moves bytes between ranks.
    tcp_enabled: bool,
    /// Whether MPI does.
    mpi_enabled: bool,
    /// Whether several threads may call MPI; see [`World::mpi_threads_supported`].
    mpi_threads_supported: bool,
);

fn install_panic_hook() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let default_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            default_hook(info);
            // A panic while the slot is locked must not wait for itself.
            let world = WORLD.try_lock().and_then(|mut slot| slot.take());
            if let Some(world) = world.filter(|world| world.size() > 1) {
                world.abort(&format!("it panicked: {info}"));
                std::process::exit(PANIC_EXIT_CODE);
            }
        }));
    });
}
