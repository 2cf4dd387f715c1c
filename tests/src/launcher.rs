//! The ways to start a job.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Who starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// The test itself, one process after the other, with our own variables.
    Spawn,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// MPICH's `mpirun`.
    Mpich,
    /// Our own `hvdrun`.
    Hvdrun,
}

impl Launcher {
    /// Every launcher that this machine has.
    pub fn available() -> Vec<Launcher> {
        let all = [Launcher::Spawn, Launcher::Hvdrun, Launcher::OpenMpi, Launcher::Mpich];
        all.into_iter().filter(Launcher::is_available).collect()
    }

    /// Whether this machine has it. Says so where it has not.
    pub fn is_available(&self) -> bool {
        let found = self.program().is_none_or(|program| Command::new(program).arg("--version").output().is_ok());
        if !found {
            crate::skipped(&format!("{self:?} is not installed"));
        }
        found
    }

    fn program(self) -> Option<PathBuf> {
        match self {
            Launcher::Spawn => None,
            Launcher::OpenMpi => Some("mpirun.openmpi".into()),
            Launcher::Mpich => Some("mpirun.mpich".into()),
            Launcher::Hvdrun => Some(binary("hvdrun")),
        }
    }

    /// The command that starts all `ranks` of `program`, with arguments of its own; `None` where there is no such command.
    pub fn command(self, ranks: usize, args: &[OsString], program: &Path) -> Option<Command> {
        let mut command = Command::new(self.program()?);
        command.args(["-np", &ranks.to_string()]).args(args).arg(program);
        if self == Launcher::OpenMpi {
            // As root, with more ranks than cores, unbound.
            command
                .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
                .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
                .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
                .env("OMPI_MCA_hwloc_base_binding_policy", "none");
        }
        Some(command)
    }
}

/// A binary of this workspace, beside the running test.
///
/// # Panics
/// If it has not been built.
pub fn binary(name: &str) -> PathBuf {
    let path = target_folder().join(name);
    assert!(path.is_file(), "{name} is not built; run `cargo build --workspace` first");
    path
}

fn target_folder() -> PathBuf {
    let test = std::env::current_exe().expect("the path of the running test");
    // target/debug/deps/test-0123456789abcdef
    test.ancestors().nth(2).expect("a target folder").to_path_buf()
}

/// The MPI plugin for Open MPI, built on demand; `None`, with a message, where that cannot be.
pub fn mpi_plugin() -> Option<PathBuf> {
    static PLUGIN: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = PLUGIN.get_or_init(|| {
        let plugin = target_folder().join("libhvd_mpi.so");
        let found = plugin.is_file();
        if !found {
            crate::skipped("the MPI plugin is not built; run `cargo build --workspace` where MPI is installed");
        }
        found.then_some(plugin)
    });
    built.clone()
}
