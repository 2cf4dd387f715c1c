//! Who am I: rank, size, and where the others are, from the launcher's variables.

use std::collections::HashMap;

use crate::error::{Error, Result};

/// More ranks than this in a world are a mistake.
const MOST_RANKS: usize = 1 << 16;

/// A rank's place in its world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// This rank, `0 .. size`.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// This rank among those of its host, `0 .. local_size`.
    pub local_rank: usize,
    /// Number of ranks on this host.
    pub local_size: usize,
    /// This rank's host among those that have this local rank, `0 .. cross_size`.
    pub cross_rank: usize,
    /// Number of hosts that have this local rank.
    pub cross_size: usize,
}

/// Who started this process as a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nobody: a world of one.
    Alone,
    /// `HVD_RANK` and its siblings, set by our own launcher, a test or the user.
    Hvd,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// `torchrun`.
    Torchrun,
    /// MPICH's `mpirun` (Hydra) and its relatives.
    Hydra,
    /// Slurm's `srun`.
    Srun,
}

/// What the launcher says of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who started it.
    pub launcher: Launcher,
    /// Its place among the ranks.
    pub topology: Topology,
    /// A text that is the same on all ranks of the job and differs between jobs of one user on one host.
    pub job: String,
    /// Where the ranks of several hosts can meet, `host:port`, as far as the launcher says where rank 0 is.
    pub rendezvous: Option<String>,
}

/// The environment, as a value.
pub type Vars = HashMap<String, String>;

impl Topology {
    /// The only rank there is.
    pub fn alone() -> Self {
        Topology { rank: 0, size: 1, local_rank: 0, local_size: 1, cross_rank: 0, cross_size: 1 }
    }

    /// Whether all ranks are on one host, as far as the launcher says.
    pub fn is_single_host(&self) -> bool {
        self.local_size == self.size
    }

    /// Checks the numbers against each other.
    fn validated(self) -> Result<Self> {
        let pairs = [
            ("rank", self.rank, "size", self.size),
            ("local rank", self.local_rank, "local size", self.local_size),
            ("cross rank", self.cross_rank, "cross size", self.cross_size),
        ];
        for (what, index, of, count) in pairs {
            if index >= count {
                return Err(Error::Config(format!(
                    "the launcher's variables give {what} {index} and {of} {count}; expected 0 <= {what} < {of}"
                )));
            }
        }
        if self.size > MOST_RANKS {
            let text =
                format!("the launcher's variables give a world of {} ranks; there can be {MOST_RANKS}", self.size);
            return Err(Error::Config(text));
        }
        if self.local_size > self.size || self.local_rank > self.rank {
            return Err(Error::Config(format!(
                "the launcher's variables give {} local ranks in a world of {} (rank {}, local rank {})",
                self.local_size, self.size, self.rank, self.local_rank
            )));
        }
        Ok(self)
    }
}

impl Launch {
    /// Reads the environment of this process.
    pub fn from_env() -> Result<Self> {
        let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
        Launch::from_vars(&std::env::vars_os().filter_map(utf8_pair).collect(), parent)
    }

    /// What `vars` say, by the first launcher in this order that left its mark: our own `HVD_*`, Open MPI, `torchrun`,
    /// Hydra, `srun`; a world of one where none did. `parent` is the parent's process id, which names the job where the
    /// launcher gives it no name (ranks of one host are children of one process).
    ///
    /// # Errors
    /// [`Error::Config`] for a variable that is no number, a missing sibling, or numbers that contradict each other.
    pub fn from_vars(vars: &Vars, parent: i32) -> Result<Self> {
        let reader = Reader { vars, parent };
        let has = |name: &str| vars.contains_key(name);
        let (launcher, topology, job) = if has("HVD_RANK") || has("HVD_SIZE") {
            (Launcher::Hvd, reader.hvd()?, reader.text("HVD_JOB_ID").unwrap_or_else(|| format!("hvd-{parent}")))
        } else if has("OMPI_COMM_WORLD_SIZE") {
            (Launcher::OpenMpi, reader.open_mpi()?, reader.open_mpi_job())
        } else if has("LOCAL_WORLD_SIZE") && has("RANK") {
            (Launcher::Torchrun, reader.torchrun()?, reader.torchrun_job())
        } else if has("PMI_RANK") && (has("MPI_LOCALNRANKS") || !has("SLURM_STEP_ID")) {
            (Launcher::Hydra, reader.hydra()?, format!("hydra-{parent}"))
        } else if has("SLURM_STEP_ID") && has("SLURM_PROCID") {
            (Launcher::Srun, reader.srun()?, reader.srun_job())
        } else {
            (Launcher::Alone, Topology::alone(), format!("alone-{}", std::process::id()))
        };
        let rendezvous = match launcher {
            Launcher::Torchrun => reader.torchrun_rendezvous()?,
            Launcher::Srun => reader.srun_rendezvous()?,
            _ => None,
        };
        Ok(Launch { launcher, topology: topology.validated()?, job, rendezvous })
    }
}

fn utf8_pair((name, value): (std::ffi::OsString, std::ffi::OsString)) -> Option<(String, String)> {
    Some((name.into_string().ok()?, value.into_string().ok()?))
}

/// `rank 3`, `ranks 0-2, 5`.
pub fn listed(mut ranks: Vec<usize>) -> String {
    ranks.sort_unstable();
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for rank in ranks {
        match spans.last_mut() {
            Some((_, end)) if *end + 1 == rank => *end = rank,
            _ => spans.push((rank, rank)),
        }
    }
    let one = matches!(spans[..], [(start, end)] if start == end);
    let span = |(start, end): &(usize, usize)| if start == end { start.to_string() } else { format!("{start}-{end}") };
    let spans: Vec<_> = spans.iter().map(span).collect();
    format!("{} {}", if one { "rank" } else { "ranks" }, spans.join(", "))
}

/// Reads numbers out of the variables of each launcher.
struct Reader<'a> {
    vars: &'a Vars,
    parent: i32,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        self.vars.get(name).filter(|value| !value.is_empty()).cloned()
    }

    fn optional(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.vars.get(name) else { return Ok(None) };
        let number = value.trim().parse();
        number.map(Some).map_err(|_| Error::Config(format!("{name} is `{value}`; expected a whole number")))
    }

    fn number(&self, name: &str) -> Result<usize> {
        self.optional(name)?.ok_or_else(|| Error::Config(format!("{name} is not set, but its siblings are")))
    }

    /// Ranks are dealt to hosts in blocks of equal size unless the launcher says more.
    fn blocks(&self, rank: usize, size: usize, local_rank: usize, local_size: usize) -> Topology {
        let hosts = if local_size == 0 { 1 } else { size.div_ceil(local_size).max(1) };
        let host = rank.checked_div(local_size).unwrap_or(0).min(hosts - 1);
        Topology { rank, size, local_rank, local_size, cross_rank: host, cross_size: hosts }
    }

    fn hvd(&self) -> Result<Topology> {
        let (rank, size) = (self.number("HVD_RANK")?, self.number("HVD_SIZE")?);
        let local_size = self.optional("HVD_LOCAL_SIZE")?.unwrap_or(size);
        let local_rank = match self.optional("HVD_LOCAL_RANK")? {
            Some(local_rank) => local_rank,
            None => rank.checked_rem(local_size).unwrap_or(0),
        };
        let mut topology = self.blocks(rank, size, local_rank, local_size);
        topology.cross_rank = self.optional("HVD_CROSS_RANK")?.unwrap_or(topology.cross_rank);
        topology.cross_size = self.optional("HVD_CROSS_SIZE")?.unwrap_or(topology.cross_size);
        Ok(topology)
    }

    fn open_mpi(&self) -> Result<Topology> {
        Ok(self.blocks(
            self.number("OMPI_COMM_WORLD_RANK")?,
            self.number("OMPI_COMM_WORLD_SIZE")?,
            self.number("OMPI_COMM_WORLD_LOCAL_RANK")?,
            self.number("OMPI_COMM_WORLD_LOCAL_SIZE")?,
        ))
    }

    /// The namespace is unique among the jobs of one `mpirun`; the server's address among the `mpirun`s of the host.
    fn open_mpi_job(&self) -> String {
        let namespace = self.text("PMIX_NAMESPACE").or_else(|| self.text("OMPI_MCA_ess_base_jobid"));
        let server = self.text("OMPI_MCA_orte_hnp_uri").or_else(|| self.text("PMIX_SERVER_URI2"));
        let head = server.as_deref().and_then(|uri| uri.split(';').next()).unwrap_or("").to_string();
        format!("ompi-{}-{head}", namespace.unwrap_or_else(|| self.parent.to_string()))
    }

    fn torchrun(&self) -> Result<Topology> {
        let mut topology = self.blocks(
            self.number("RANK")?,
            self.number("WORLD_SIZE")?,
            self.number("LOCAL_RANK")?,
            self.number("LOCAL_WORLD_SIZE")?,
        );
        topology.cross_rank = self.optional("GROUP_RANK")?.unwrap_or(topology.cross_rank);
        topology.cross_size = self.optional("GROUP_WORLD_SIZE")?.unwrap_or(topology.cross_size);
        Ok(topology)
    }

    fn torchrun_job(&self) -> String {
        let parts = ["TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"];
        let parts = parts.map(|name| self.text(name).unwrap_or_default());
        format!("torchrun-{}", parts.join("-"))
    }

    /// On the host of rank 0 `torchrun`'s own agent listens on MASTER_PORT: its neighbour is ours.
    fn torchrun_rendezvous(&self) -> Result<Option<String>> {
        let (Some(host), Some(port)) = (self.text("MASTER_ADDR"), self.optional("MASTER_PORT")?) else {
            return Ok(None);
        };
        let port = if port < usize::from(u16::MAX) { port + 1 } else { port - 1 };
        Ok(Some(joined(&host, port)))
    }

    fn hydra(&self) -> Result<Topology> {
        let (rank, size) = (self.number("PMI_RANK")?, self.number("PMI_SIZE")?);
        let local_size = self.optional("MPI_LOCALNRANKS")?.unwrap_or(size);
        let local_rank = self.optional("MPI_LOCALRANKID")?.unwrap_or(rank);
        Ok(self.blocks(rank, size, local_rank, local_size))
    }

    fn srun(&self) -> Result<Topology> {
        let size = match self.optional("SLURM_STEP_NUM_TASKS")? {
            Some(size) => size,
            None => self.number("SLURM_NTASKS")?,
        };
        let (rank, local_rank) = (self.number("SLURM_PROCID")?, self.number("SLURM_LOCALID")?);
        let layout = self.text("SLURM_STEP_TASKS_PER_NODE").or_else(|| self.text("SLURM_TASKS_PER_NODE"));
        let per_node = match layout {
            Some(layout) => parse_tasks_per_node(&layout)?,
            None => vec![size],
        };
        let node = self.optional("SLURM_NODEID")?.unwrap_or(0);
        let local_size = *per_node.get(node).ok_or_else(|| {
            Error::Config(format!(
                "SLURM_NODEID is {node}, but the tasks per node are given for {} nodes",
                per_node.len()
            ))
        })?;
        let with_this_local_rank = |nodes: &[usize]| nodes.iter().filter(|&&tasks| tasks > local_rank).count();
        let (cross_rank, cross_size) = (with_this_local_rank(&per_node[..node]), with_this_local_rank(&per_node));
        Ok(Topology { rank, size, local_rank, local_size, cross_rank, cross_size })
    }

    /// Task 0 runs on the first node of the step. The port follows from job and step, so that jobs do not collide; it lies
    /// below those that Linux gives to outgoing connections.
    fn srun_rendezvous(&self) -> Result<Option<String>> {
        const PORTS: std::ops::Range<usize> = 20_000..32_000;
        let nodes = self.text("SLURM_STEP_NODELIST").or_else(|| self.text("SLURM_JOB_NODELIST"));
        let (Some(nodes), Some(job)) = (nodes, self.optional("SLURM_JOB_ID")?) else { return Ok(None) };
        let step = self.optional("SLURM_STEP_ID")?.unwrap_or(0);
        let port = PORTS.start + job.wrapping_mul(16).wrapping_add(step) % PORTS.len();
        Ok(Some(joined(&first_node(&nodes), port)))
    }

    fn srun_job(&self) -> String {
        let parts = ["SLURM_JOB_ID", "SLURM_STEP_ID"].map(|name| self.text(name).unwrap_or_default());
        format!("srun-{}", parts.join("-"))
    }
}

/// Host and port as one text; an IPv6 address in brackets.
fn joined(host: &str, port: usize) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The first name of Slurm's notation for nodes: `node[07-09,12],login` is node07, node08 and so on.
fn first_node(list: &str) -> String {
    let mut name = String::new();
    let mut rest = list;
    while let Some((before, after)) = rest.split_once('[').filter(|(before, _)| !before.contains(',')) {
        let (numbers, after) = after.split_once(']').unwrap_or((after, ""));
        name.push_str(before);
        name.push_str(numbers.split([',', '-']).next().unwrap_or(""));
        rest = after;
    }
    name + rest.split(',').next().unwrap_or("")
}

/// Slurm's notation for tasks on each node: `2(x3),1` is `[2, 2, 2, 1]`.
fn parse_tasks_per_node(text: &str) -> Result<Vec<usize>> {
    const MAX_NODES: usize = 1 << 20;
    let bad = || Error::Config(format!("tasks per node are `{text}`; expected a list such as `2(x3),1`"));
    let mut nodes = Vec::new();
    for item in text.split(',') {
        let (tasks, repeat) = match item.split_once("(x") {
            Some((tasks, repeat)) => (tasks, repeat.strip_suffix(')').ok_or_else(bad)?.parse().map_err(|_| bad())?),
            None => (item, 1),
        };
        if repeat > MAX_NODES - nodes.len() {
            return Err(bad());
        }
        nodes.resize(nodes.len() + repeat, tasks.trim().parse().map_err(|_| bad())?);
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> Vars {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    fn launch(pairs: &[(&str, &str)]) -> Launch {
        Launch::from_vars(&vars(pairs), 77).expect("a launch")
    }

    fn refused(pairs: &[(&str, &str)]) -> String {
        Launch::from_vars(&vars(pairs), 77).expect_err("an error").to_string()
    }

    #[test]
    fn ranks_are_listed_in_spans() {
        assert_eq!(listed(vec![3]), "rank 3");
        assert_eq!(listed(vec![2, 0, 1, 5]), "ranks 0-2, 5");
    }

    #[test]
    fn a_process_without_a_launcher_is_a_world_of_one() {
        let launch = launch(&[("PATH", "/bin"), ("SLURM_JOB_ID", "1"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]);
        assert_eq!(launch.launcher, Launcher::Alone);
        assert_eq!(launch.topology, Topology::alone());
    }

    #[test]
    fn open_mpi_on_two_hosts() {
        let launch = launch(&[
            ("OMPI_COMM_WORLD_RANK", "5"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
            ("PMIX_NAMESPACE", "123"),
            ("OMPI_MCA_orte_hnp_uri", "122.0;tcp://10.0.0.1:1"),
            // A batch job around it must not confuse us.
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "0"),
        ]);
        let expected = Topology { rank: 5, size: 8, local_rank: 1, local_size: 4, cross_rank: 1, cross_size: 2 };
        assert_eq!(launch.topology, expected);
        assert_eq!(launch.job, "ompi-123-122.0");
        assert!(!launch.topology.is_single_host());
    }

    #[test]
    fn hydra_names_the_job_after_its_parent() {
        let launch =
            launch(&[("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")]);
        assert_eq!(launch.launcher, Launcher::Hydra);
        assert_eq!((launch.topology.rank, launch.topology.local_size), (1, 2));
        assert_eq!(launch.job, "hydra-77");
    }

    #[test]
    fn srun_with_uneven_nodes() {
        let launch = launch(&[
            ("SLURM_STEP_ID", "3"),
            ("SLURM_JOB_ID", "9"),
            ("SLURM_PROCID", "6"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "3"),
            ("SLURM_STEP_NUM_TASKS", "7"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1"),
            ("PMI_RANK", "6"), // srun --mpi=pmi2 sets these as well
            ("PMI_SIZE", "7"),
            ("SLURM_STEP_NODELIST", "node[07-09],login"),
        ]);
        let expected = Topology { rank: 6, size: 7, local_rank: 0, local_size: 1, cross_rank: 3, cross_size: 4 };
        assert_eq!((launch.launcher, launch.topology), (Launcher::Srun, expected));
        assert_eq!(launch.job, "srun-9-3");
        assert_eq!(launch.rendezvous.as_deref(), Some("node07:20147"));
    }

    #[test]
    fn the_first_node_of_slurms_lists() {
        for (list, first) in [
            ("node1", "node1"),
            ("b,a", "b"),
            ("n[3,5-7]", "n3"),
            ("rack[1-2]n[03-04]-ib,x", "rack1n03-ib"),
            ("a,n[1-2]", "a"),
            ("n[1", "n1"),
            ("", ""),
        ] {
            assert_eq!(first_node(list), first);
        }
    }

    #[test]
    fn torchrun_gives_groups() {
        let launch = launch(&[
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_RANK", "1"),
            ("GROUP_WORLD_SIZE", "2"),
            ("TORCHELASTIC_RUN_ID", "abc"),
            ("MASTER_PORT", "29500"),
            ("MASTER_ADDR", "fd00::1"),
        ]);
        assert_eq!(launch.launcher, Launcher::Torchrun);
        assert_eq!((launch.topology.cross_rank, launch.topology.cross_size), (1, 2));
        assert_eq!(launch.job, "torchrun-abc-29500-");
        assert_eq!(launch.rendezvous.as_deref(), Some("[fd00::1]:29501"));
    }

    #[test]
    fn our_own_variables_win_and_have_defaults() {
        let launch = launch(&[("HVD_RANK", "2"), ("HVD_SIZE", "4"), ("OMPI_COMM_WORLD_SIZE", "9")]);
        let expected = Topology { rank: 2, size: 4, local_rank: 2, local_size: 4, cross_rank: 0, cross_size: 1 };
        assert_eq!((launch.launcher, launch.topology), (Launcher::Hvd, expected));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        assert!(refused(&[("HVD_RANK", "x"), ("HVD_SIZE", "2")]).contains("HVD_RANK is `x`"));
        assert!(refused(&[("HVD_RANK", "0")]).contains("HVD_SIZE is not set"));
        assert!(refused(&[("HVD_RANK", "2"), ("HVD_SIZE", "2")]).contains("rank 2 and size 2"));
        assert!(refused(&[("HVD_RANK", "0"), ("HVD_SIZE", "0")]).contains("size 0"));
        assert!(refused(&[("HVD_RANK", "0"), ("HVD_SIZE", "2"), ("HVD_LOCAL_SIZE", "4")]).contains("4 local ranks"));
        assert!(refused(&[("OMPI_COMM_WORLD_SIZE", "2")]).contains("OMPI_COMM_WORLD_RANK is not set"));
        let slurm = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0"), ("SLURM_NTASKS", "2")];
        for layout in ["2(x", "a", "", "2(x99999999999)", "2(x3"] {
            let mut pairs = slurm.to_vec();
            pairs.push(("SLURM_TASKS_PER_NODE", layout));
            if !layout.is_empty() {
                assert!(refused(&pairs).contains("tasks per node"), "{layout}");
            }
        }
    }
}
