//! The MPI plugin: where it is, and its functions.

use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};

use crate::error::{Error, Result};

/// The version of the interface that this code speaks.
const ABI_VERSION: u32 = 1;

const FILE_NAME: &str = "libhvd_mpi.so";

/// The functions of the plugin. Loaded once, and never unloaded: MPI does not survive it.
pub(super) struct Plugin {
    path: PathBuf,
    init: Symbol<unsafe extern "C" fn() -> i64>,
    rank: Symbol<unsafe extern "C" fn() -> i64>,
    size: Symbol<unsafe extern "C" fn() -> i64>,
    max_tag: Symbol<unsafe extern "C" fn() -> i64>,
    isend: Symbol<unsafe extern "C" fn(*const u8, u64, c_int, c_int) -> i64>,
    irecv: Symbol<unsafe extern "C" fn(*mut u8, u64, c_int, c_int) -> i64>,
    test: Symbol<unsafe extern "C" fn(i64, *mut u64) -> i64>,
    change_users: Symbol<unsafe extern "C" fn(i64) -> i64>,
    library_version: Symbol<unsafe extern "C" fn(*mut u8, u64) -> u64>,
    last_error: Symbol<unsafe extern "C" fn(*mut u8, u64) -> u64>,
    _library: Library,
}

impl Plugin {
    /// The plugin of this process.
    pub(super) fn get() -> Result<&'static Plugin> {
        static PLUGIN: OnceLock<Result<Plugin>> = OnceLock::new();
        PLUGIN.get_or_init(|| Plugin::open(&find()?)).as_ref().map_err(Clone::clone)
    }

    fn open(path: &Path) -> Result<Plugin> {
        let refused = |error: libloading::Error| {
            Error::Config(format!(
                "cannot load the MPI plugin {}: {error}; it needs the MPI that it was built with",
                path.display()
            ))
        };
        // MPI loads plugins of its own, which look for MPI's symbols among the global ones.
        // SAFETY: the library is our own, and what MPI does when it is loaded is harmless.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(refused)?;
        // SAFETY: the types are those of the plugin's functions; the version is compared before any other is used.
        unsafe {
            let version: Symbol<unsafe extern "C" fn() -> u32> =
                library.get(b"hvd_mpi_abi_version").map_err(refused)?;
            let version = version();
            if version != ABI_VERSION {
                return Err(Error::Config(format!(
                    "the MPI plugin {} has interface {version}, this program needs {ABI_VERSION}; build both together",
                    path.display()
                )));
            }
            Ok(Plugin {
                path: path.to_path_buf(),
                init: library.get(b"hvd_mpi_init").map_err(refused)?,
                rank: library.get(b"hvd_mpi_rank").map_err(refused)?,
                size: library.get(b"hvd_mpi_size").map_err(refused)?,
                max_tag: library.get(b"hvd_mpi_max_tag").map_err(refused)?,
                isend: library.get(b"hvd_mpi_isend").map_err(refused)?,
                irecv: library.get(b"hvd_mpi_irecv").map_err(refused)?,
                test: library.get(b"hvd_mpi_test").map_err(refused)?,
                change_users: library.get(b"hvd_mpi_use").map_err(refused)?,
                library_version: library.get(b"hvd_mpi_library_version").map_err(refused)?,
                last_error: library.get(b"hvd_mpi_last_error").map_err(refused)?,
                _library: library,
            })
        }
    }

    /// Where it was found.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Starts MPI.
    pub(super) fn init(&self) -> Result<()> {
        // SAFETY: takes nothing.
        self.checked(unsafe { (self.init)() }).map(drop)
    }

    /// MPI's rank of this process, and its number of ranks.
    pub(super) fn place(&self) -> Result<(usize, usize)> {
        // SAFETY: they take nothing.
        let (rank, size) = unsafe { ((self.rank)(), (self.size)()) };
        Ok((self.checked(rank)? as usize, self.checked(size)? as usize))
    }

    /// The highest tag.
    pub(super) fn max_tag(&self) -> Result<u64> {
        // SAFETY: takes nothing.
        self.checked(unsafe { (self.max_tag)() }).map(|tag| tag as u64)
    }

    /// Starts to send.
    ///
    /// # Safety
    /// The bytes must be readable and stay as they are until the request has tested as complete.
    pub(super) unsafe fn isend(&self, data: *const u8, length: usize, peer: usize, tag: i32) -> Result<i64> {
        // SAFETY: promised by the caller.
        self.checked(unsafe { (self.isend)(data, length as u64, peer as c_int, tag) })
    }

    /// Starts to receive.
    ///
    /// # Safety
    /// The bytes must be writable and left alone until the request has tested as complete.
    pub(super) unsafe fn irecv(&self, into: *mut u8, length: usize, peer: usize, tag: i32) -> Result<i64> {
        // SAFETY: promised by the caller.
        self.checked(unsafe { (self.irecv)(into, length as u64, peer as c_int, tag) })
    }

    /// The bytes received if a request is complete; it is forgotten then.
    pub(super) fn test(&self, request: i64) -> Result<Option<u64>> {
        let mut received = 0;
        // SAFETY: the pointer is to a local.
        let done = self.checked(unsafe { (self.test)(request, &mut received) })?;
        Ok((done == 1).then_some(received))
    }

    /// Counts one more or one fewer user of MPI, and gives how many there are.
    pub(super) fn change_users(&self, change: i64) -> Result<i64> {
        // SAFETY: takes a number.
        self.checked(unsafe { (self.change_users)(change) })
    }

    /// Name and version of the MPI library.
    pub(super) fn library_version(&self) -> String {
        self.text(&self.library_version)
    }

    fn checked(&self, result: i64) -> Result<i64> {
        if result >= 0 {
            return Ok(result);
        }
        Err(Error::Protocol { peer: "MPI".into(), detail: self.text(&self.last_error) })
    }

    fn text(&self, function: &Symbol<unsafe extern "C" fn(*mut u8, u64) -> u64>) -> String {
        let mut buffer = vec![0; 16 << 10];
        // SAFETY: the buffer has the length that is given.
        let length = unsafe { function(buffer.as_mut_ptr(), buffer.len() as u64) };
        buffer.truncate(length as usize);
        String::from_utf8_lossy(&buffer).into_owned()
    }
}

/// Looks for the plugin: where `HVD_MPI_PLUGIN` says, else beside the executable and in the folder above it, there
/// first in the sub-folder of the MPI whose launcher has started us.
fn find() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HVD_MPI_PLUGIN") {
        return Ok(path.into());
    }
    let executable = std::env::current_exe().map_err(|error| Error::io("asking for the executable's path", error))?;
    let flavour = flavour(|name| std::env::var_os(name).is_some());
    let candidates = candidates(&executable, flavour);
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        Error::Config(format!(
            "the MPI plugin is in none of these places: {candidates:?}; build it (cargo build --release -p hvd-mpi), say \
             where it is (HVD_MPI_PLUGIN), or do without (HVD_TRANSPORT=tcp)"
        ))
    })
}

/// The MPI whose launcher has set these variables.
fn flavour(is_set: impl Fn(&str) -> bool) -> Option<&'static str> {
    let any = |names: &[&str]| names.iter().any(|name| is_set(name));
    if any(&["OMPI_COMM_WORLD_SIZE", "PMIX_RANK"]) {
        Some("openmpi")
    } else if any(&["PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"]) {
        Some("mpich")
    } else {
        None
    }
}

fn candidates(executable: &Path, flavour: Option<&str>) -> Vec<PathBuf> {
    let folders = executable.ancestors().skip(1).take(2);
    let in_folder = |folder: &Path| {
        flavour.iter().map(|flavour| folder.join(flavour).join(FILE_NAME)).chain([folder.join(FILE_NAME)]).collect()
    };
    folders.flat_map(|folder| -> Vec<PathBuf> { in_folder(folder) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launchers_own_mpi_comes_first() {
        let found = candidates(Path::new("/t/debug/deps/test"), Some("mpich"));
        let expected = ["/t/debug/deps/mpich/", "/t/debug/deps/", "/t/debug/mpich/", "/t/debug/"];
        assert_eq!(found, expected.map(|folder| Path::new(folder).join(FILE_NAME)));
        assert_eq!(candidates(Path::new("/t/train"), None), [Path::new("/t").join(FILE_NAME), "/libhvd_mpi.so".into()]);
    }

    #[test]
    fn launchers_are_known_by_their_variables() {
        assert_eq!(flavour(|name| name == "OMPI_COMM_WORLD_SIZE"), Some("openmpi"));
        assert_eq!(flavour(|name| name == "PMI_RANK"), Some("mpich"));
        assert_eq!(flavour(|_| false), None);
    }
}
