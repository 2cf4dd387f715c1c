//! From environment variables to a world.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use rustix::process::Signal;

use super::agreement::agree;
use super::{Backend, Inner, ProcessSet, World, affinity};
use crate::collective::{self, Places, Sharing};
use crate::config::{Config, TransportChoice, environment, remarks};
use crate::engine::timeline;
use crate::engine::{Core, Engine, Observers, Patience, WORLD};
use crate::error::{Error, Result};
use crate::shm::ShmGroup;
use crate::topology::{Launch, Launcher, Topology};
use crate::transport::Transport;
use crate::transport::mpi::MpiTransport;
use crate::transport::tcp::{Identity, Meeting, Secret, TcpOptions, TcpTransport, source_address};
use crate::transport::thread::ThreadTransport;

/// Worlds that this process has been in: ranks of different generations never talk to each other. A start that failed
/// does not count, so that it can be tried again with a rank that came too late for it.
static GENERATION: Mutex<u64> = Mutex::new(0);

/// Meets the other ranks.
pub(super) fn world(config: Config) -> Result<World> {
    let launch = Launch::from_env()?;
    let topology = launch.topology.clone();
    if topology.rank == 0 {
        remarks(&environment()).iter().for_each(|remark| tracing::warn!("{remark}"));
    }
    die_with_launcher(launch.launcher)?;
    if let (Some(path), 0) = (&config.timeline, topology.local_rank) {
        // The ranks of this host append only after all have met. What cannot be removed, they will not be able to open.
        drop(timeline::remove(path, &topology));
    }
    if topology.size == 1 {
        return observed(wrap(topology, Backend::Solo, Backend::Solo, Arc::default(), None, None), &config);
    }
    let mut transport = next_transport(&config, &launch)?;
    let deadline = Instant::now() + config.start_timeout;
    let places = Places::gather(&mut *transport)?;
    let sharing = sharing(&mut *transport, &places, &config, deadline)?;
    observed(start(transport, sharing, topology, patience(&places, &config), &config)?, &config)
}

/// How long the engine's threads wait before they sleep, and how.
fn patience(places: &Places, config: &Config) -> Patience {
    match places.are_crowded() {
        true => Patience::crowded(config.spin),
        false => Patience::alone(config.spin),
    }
}

/// Has ranks of one host share memory, if the settings, which are the same on all ranks, allow it.
fn sharing(transport: &mut dyn Transport, places: &Places, config: &Config, deadline: Instant) -> Result<Sharing> {
    if !config.shared_memory {
        return Ok(Sharing::None);
    }
    Ok(match collective::share(transport, places, config.shm_slot_bytes, deadline)? {
        Sharing::Within(_) if !config.hierarchical_allreduce => Sharing::None,
        found => found,
    })
}

/// A world with the timeline that its settings ask for.
fn observed(world: World, config: &Config) -> Result<World> {
    if let Some(path) = &config.timeline {
        world.start_timeline(path, config.timeline_mark_rounds)?;
    }
    Ok(world)
}

/// Has the kernel end this process when `mpirun` is killed, which can no longer do so itself: a rank that does not use MPI
/// would go on without it.
fn die_with_launcher(launcher: Launcher) -> Result<()> {
    if !matches!(launcher, Launcher::OpenMpi | Launcher::Hydra) {
        return Ok(());
    }
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| Error::io("cannot ask to be ended together with mpirun", error))?;
    // It may have died before we asked; then somebody adopted us.
    match rustix::process::getppid() == parent {
        true => Ok(()),
        false => Err(Error::Config("mpirun, which started this process, is gone".into())),
    }
}

/// One rank of a world of threads, with or without shared memory.
pub(super) fn thread_rank(mut transport: ThreadTransport, config: &Config, share: bool) -> Result<World> {
    let (rank, size) = (transport.rank(), transport.size());
    let topology = Topology { rank, size, local_rank: rank, local_size: size, cross_rank: 0, cross_size: 1 };
    if size == 1 {
        return observed(wrap(topology, Backend::Solo, Backend::Solo, Arc::default(), None, None), config);
    }
    let places = Places::gather(&mut transport)?;
    let sharing = match share {
        true => sharing(&mut transport, &places, config, Instant::now() + config.start_timeout)?,
        false => Sharing::None,
    };
    observed(start(Box::new(transport), sharing, topology, patience(&places, config), config)?, config)
}

fn start(
    transport: Box<dyn Transport>,
    sharing: Sharing,
    topology: Topology,
    patience: Patience,
    config: &Config,
) -> Result<World> {
    let over = match transport.name() {
        "mpi" => Backend::Mpi,
        "thread" => Backend::Thread,
        _ => Backend::Tcp,
    };
    let backend = match &sharing {
        Sharing::All(_) => Backend::Shm,
        Sharing::Within(_) => Backend::Hierarchical,
        Sharing::None => over,
    };
    let may_share = sharing.group().is_some() || (config.shared_memory && !topology.is_single_host());
    let (waiter, observers) = (transport.waiter(), Arc::<Observers>::default());
    let shared = sharing.all().cloned();
    let core = Core::new(transport, sharing, may_share, config, observers.clone())?;
    let processor = affinity::processor(config, topology.local_rank)?;
    let engine = affinity::inherited(processor, || Engine::start(core, waiter, patience))?;
    tracing::debug!(rank = topology.rank, size = topology.size, %backend, "joined the world");
    Ok(wrap(topology, backend, over, observers, Some(engine), shared))
}

fn wrap(
    topology: Topology,
    backend: Backend,
    transport: Backend,
    observers: Arc<Observers>,
    engine: Option<Engine>,
    shared: Option<Arc<ShmGroup>>,
) -> World {
    let ranks = (0..topology.size).collect();
    let (timeline, founding, shared_buffers) = Default::default();
    let world = Inner { topology, observers, timeline, transport, founding, engine, shared, shared_buffers };
    World(ProcessSet::new(Arc::new(world), WORLD, ranks, backend))
}

/// The transport of this process's next world.
fn next_transport(config: &Config, launch: &Launch) -> Result<Box<dyn Transport>> {
    let mut generation = GENERATION.lock();
    let Topology { rank, size, .. } = launch.topology;
    let transport = transport(config, launch, Identity { rank, size, generation: *generation })?;
    *generation += 1;
    Ok(transport)
}

/// The transport that the settings ask for, or else the first that can introduce the ranks to each other. They have found that
/// they fit together.
fn transport(config: &Config, launch: &Launch, identity: Identity) -> Result<Box<dyn Transport>> {
    let meeting = meeting(config, launch)?;
    let bind = match (config.bind, &meeting) {
        // Where the way to rank 0 begins, the other ranks reach this one.
        (None, Some(Meeting::Tcp { address, .. })) => source_address(address).ok(),
        (bind, _) => bind,
    };
    let Config { start_timeout, peer_timeout, .. } = *config;
    let options = TcpOptions { bind, start_timeout, peer_timeout, ..TcpOptions::default() };
    if let Some(meeting) = meeting {
        let mut mesh = TcpTransport::connect(identity, &meeting, &options)?;
        agree(&mut mesh, config, Instant::now() + start_timeout)?;
        return match config.transport {
            TransportChoice::Mpi => Ok(Box::new(MpiTransport::beside(mesh)?)),
            TransportChoice::Auto | TransportChoice::Tcp => Ok(Box::new(mesh)),
        };
    }
    let mpi_launched = matches!(launch.launcher, Launcher::OpenMpi | Launcher::Hydra);
    match config.transport {
        TransportChoice::Mpi => through_mpi(identity, config, &options),
        TransportChoice::Auto if mpi_launched => through_mpi(identity, config, &options),
        TransportChoice::Auto | TransportChoice::Tcp => Err(Error::Config(match &launch.rendezvous {
            Some(address) => format!(
                "the ranks are on several hosts and would meet at {address}, but HVD_SECRET is not set; give all of them the \
                 same, for instance by `export HVD_SECRET=$(openssl rand -hex 32)` before the launcher starts"
            ),
            None => "the ranks are on several hosts and nothing says where they meet; give all of them \
                     HVD_RENDEZVOUS=host:port (an address of rank 0's host) and the same HVD_SECRET, or start them by hvdrun"
                .into(),
        })),
    }
}

/// The transport of ranks that only MPI can introduce to each other.
fn through_mpi(identity: Identity, config: &Config, options: &TcpOptions) -> Result<Box<dyn Transport>> {
    let mut transport = MpiTransport::load(identity, options)?;
    agree(&mut transport, config, Instant::now() + config.start_timeout)?;
    Ok(Box::new(transport))
}

/// Where the ranks meet over sockets: at the address in the settings, on their one host, or where the launcher lets us guess.
fn meeting(config: &Config, launch: &Launch) -> Result<Option<Meeting>> {
    let single_host = launch.topology.is_single_host();
    let address = match (&config.rendezvous, single_host) {
        (Some(address), _) => Some(address),
        (None, true) => return Ok(Some(Meeting::Unix { job: launch.job.clone() })),
        (None, false) => launch.rendezvous.as_ref(),
    };
    match (address, &config.secret) {
        (Some(address), Some(secret)) => {
            Ok(Some(Meeting::Tcp { address: address.clone(), secret: Secret::new(secret.as_str())? }))
        }
        _ => Ok(None),
    }
}
