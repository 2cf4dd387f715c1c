//! From environment variables to a world.

use std::sync::Arc;

use super::{Backend, Inner, World};
use crate::config::Config;
use crate::engine::{Core, Engine, Observers};
use crate::error::{Error, Result};
use crate::shm::ShmGroup;
use crate::topology::{Launch, Topology};
use crate::transport::Transport;
use crate::transport::thread::ThreadTransport;

/// Meets the other ranks.
pub(super) fn world(config: Config) -> Result<World> {
    let Launch { launcher, topology, job } = Launch::from_env()?;
    if topology.size == 1 {
        return Ok(wrap(topology, Backend::Solo, Arc::default(), None));
    }
    let _ = (launcher, job, config);
    Err(Error::Config("several processes need the tcp transport, which is to land".into()))
}

/// One rank of a world of threads.
pub(super) fn thread_rank(transport: ThreadTransport, config: &Config) -> Result<World> {
    let (rank, size) = (transport.rank(), transport.size());
    let topology = Topology { rank, size, local_rank: rank, local_size: size, cross_rank: 0, cross_size: 1 };
    if size == 1 {
        return Ok(wrap(topology, Backend::Solo, Arc::default(), None));
    }
    start(Box::new(transport), None, topology, config)
}

fn start(
    transport: Box<dyn Transport>,
    shared: Option<Arc<ShmGroup>>,
    topology: Topology,
    config: &Config,
) -> Result<World> {
    let backend = match (&shared, transport.name()) {
        (Some(_), _) => Backend::Shm,
        (None, "mpi") => Backend::Mpi,
        (None, "thread") => Backend::Thread,
        (None, _) => Backend::Tcp,
    };
    let (waiter, observers) = (transport.waiter(), Arc::<Observers>::default());
    let core = Core::new(transport, shared, config, observers.clone());
    let engine = Engine::start(core, waiter, config.spin)?;
    tracing::debug!(rank = topology.rank, size = topology.size, %backend, "joined the world");
    Ok(wrap(topology, backend, observers, Some(engine)))
}

fn wrap(topology: Topology, backend: Backend, observers: Arc<Observers>, engine: Option<Engine>) -> World {
    World(Arc::new(Inner { topology, backend, observers, engine, unnamed: Default::default() }))
}
