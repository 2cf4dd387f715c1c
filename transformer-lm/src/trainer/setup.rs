//! Who this rank is, and which cores and device are its own.

use hvd_core::topology::{Launch, Topology};
use hvd_torch::World;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tch::Device;

use crate::config::DeviceChoice;
use crate::{Error, Result};

/// Whoever sets one of these decides where threads run; we then leave the affinity mask alone.
const BINDING_VARIABLES: &[&str] = &["OMPI_MCA_hwloc_base_binding_policy", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"];

/// This rank's place in the world.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Number of ranks.
    pub world_size: usize,
    /// This rank.
    pub rank: usize,
    /// This rank among those of its host.
    pub local_rank: usize,
    /// Whether CUDA can be used.
    pub cuda: bool,
    /// Threads that libtorch computes with in this rank.
    pub threads: usize,
    /// Whether the host's ranks outnumber its cores.
    pub crowded: bool,
    /// The world itself.
    pub world: World,
}

/// Finds the other ranks and deals the host's cores to its ranks.
///
/// `require_distributed` refuses a world of one. Calling it twice gives the same world.
///
/// # Errors
/// [`Error::Config`] for a world of one where more are required; [`Error::Hvd`] where the ranks do not find each other.
pub fn setup_horovod(require_distributed: bool) -> Result<Setup> {
    // Before anything starts a thread, which would inherit a narrow mask.
    let topology = Launch::from_env().map_err(hvd_torch::Error::from)?.topology;
    let (threads, crowded) = deal_cores(&topology);
    let world = hvd_torch::init().map_err(hvd_torch::Error::from)?;
    if require_distributed && world.size() == 1 {
        let text = "this needs several ranks, but there is only one\n\
                    hint: start it with a launcher, for example `mpirun -np 2 …`";
        return Err(Error::Config(text.into()));
    }
    let (world_size, rank, local_rank) = (world.size(), world.rank(), topology.local_rank);
    Ok(Setup { world_size, rank, local_rank, cuda: tch::Cuda::is_available(), threads, crowded, world })
}

/// The rank that the launcher gave this process; 0 where that cannot be told. Usable before [`setup_horovod`].
pub fn launched_rank() -> usize {
    Launch::from_env().map_or(0, |launch| launch.topology.rank)
}

/// Gives this rank its share of the host's cores and sets libtorch's threads; how many, and whether ranks outnumber cores.
///
/// Launchers bind a rank to one core when they know too little (Open MPI with 1 or 2 ranks), so the mask is widened first.
/// Where ranks fill the cores each computes with one thread: more would spin in each other's way.
fn deal_cores(topology: &Topology) -> (usize, bool) {
    let asked = std::env::var("OMP_NUM_THREADS").ok().and_then(|text| text.trim().parse().ok()).filter(|n| *n > 0);
    let bound = BINDING_VARIABLES.iter().any(|name| std::env::var_os(name).is_some_and(|value| value != "none"));
    let cores = if bound { own_cores() } else { widen() };
    let share = if bound { &cores[..] } else { share_of(&cores, topology.local_rank, topology.local_size) };
    if !bound && !share.is_empty() {
        bind(share);
    }
    let fill = topology.local_size >= cores.len() && !bound;
    let threads = asked.unwrap_or(if fill { 1 } else { share.len().max(1) });
    tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    (threads, !bound && topology.local_size > cores.len())
}

/// A rank's cores: an equal part, or all where there are not enough to go round.
fn share_of(cores: &[usize], local_rank: usize, local_size: usize) -> &[usize] {
    if local_size == 0 || local_size > cores.len() {
        return cores;
    }
    let edge = |rank: usize| cores.len() * rank / local_size;
    &cores[edge(local_rank)..edge(local_rank + 1)]
}

/// Asks for every core; the system grants those that this job may use.
fn widen() -> Vec<usize> {
    bind(&(0..CpuSet::MAX_CPU).collect::<Vec<_>>());
    own_cores()
}

fn own_cores() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
}

/// A refusal is no harm: the mask then stays as it was.
fn bind(cores: &[usize]) {
    let mut set = CpuSet::new();
    cores.iter().for_each(|core| set.set(*core));
    let _ = sched_setaffinity(None, &set);
}

/// The device that `choice` means for this rank.
///
/// # Errors
/// [`Error::Config`] for CUDA where there is none.
pub fn device_of(choice: DeviceChoice, setup: &Setup) -> Result<Device> {
    let count = if setup.cuda { tch::Cuda::device_count().max(0) as usize } else { 0 };
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto if count == 0 => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(Device::Cuda(setup.local_rank % count)),
        DeviceChoice::Cuda(None) if count > 0 => Ok(Device::Cuda(setup.local_rank % count)),
        DeviceChoice::Cuda(Some(index)) if index < count => Ok(Device::Cuda(index)),
        DeviceChoice::Cuda(_) => Err(Error::Config(format!(
            "training.device = {choice}, but {count} CUDA devices can be used\n\
             hint: put the `lib` folder of a libtorch with CUDA on LD_LIBRARY_PATH, or use device: cpu"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_dealt_evenly_or_shared() {
        let cores = [0, 1, 2, 5, 6, 7];
        assert_eq!(share_of(&cores, 0, 1), cores);
        assert_eq!(share_of(&cores, 1, 2), [5, 6, 7]);
        let dealt: Vec<usize> = (0..4).flat_map(|rank| share_of(&cores, rank, 4).to_vec()).collect();
        assert_eq!(dealt, cores);
        assert_eq!(share_of(&cores, 3, 8), cores);
    }
}
