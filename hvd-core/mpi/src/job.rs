//! The calls of MPI.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::null_mut;

use mpi::ffi::{self, MPI_Comm, MPI_Request, MPI_Status};

use crate::slab::Slab;

/// Most bytes of one MPI message; a longer one goes in pieces of this length under one tag, which MPI keeps in order.
const PIECE_BYTES: u64 = 1 << 30;

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> c_int;
}

/// MPI, started, with its operations under way.
pub(crate) struct Job {
    comm: MPI_Comm,
    pub(crate) rank: c_int,
    pub(crate) size: c_int,
    pub(crate) max_tag: c_int,
    /// How many use MPI; see `hvd_mpi_use`.
    pub(crate) users: i64,
    /// Whether MPI was started here and not by the program.
    started_here: bool,
    requests: Slab<Pending>,
}

// SAFETY: MPI's handles are numbers or pointers into the library, which was started with support for threads; they are
// used under one lock.
unsafe impl Send for Job {}

/// Bytes of the caller.
#[derive(Clone, Copy)]
pub(crate) struct Lent {
    pub(crate) data: *mut u8,
    pub(crate) length: u64,
}

/// An operation under way.
struct Pending {
    pieces: Vec<MPI_Request>,
    /// Bytes of the pieces that are complete; of a receive.
    received: Option<u64>,
}

impl Job {
    /// Starts MPI, or joins it if the program has.
    pub(crate) fn start() -> Result<Job, String> {
        let started_here = init()?;
        // SAFETY: MPI is running; all pointers are to locals.
        unsafe {
            let world = ffi::RSMPI_COMM_WORLD;
            check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(world, ffi::RSMPI_ERRORS_RETURN))?;
            let mut comm = ffi::RSMPI_COMM_NULL;
            check("MPI_Comm_dup", ffi::MPI_Comm_dup(world, &mut comm))?;
            check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            let (mut rank, mut size) = (0, 0);
            check("MPI_Comm_rank", ffi::MPI_Comm_rank(comm, &mut rank))?;
            check("MPI_Comm_size", ffi::MPI_Comm_size(comm, &mut size))?;
            if started_here {
                atexit(crate::at_exit);
            }
            Ok(Job { comm, rank, size, max_tag: max_tag()?, users: 0, started_here, requests: Slab::new() })
        }
    }

    /// # Safety
    /// The bytes must stay as they are until the request is complete.
    pub(crate) unsafe fn isend(&mut self, lent: Lent, peer: c_int, tag: c_int) -> Result<i64, String> {
        let mut pieces = Vec::new();
        for piece in lent.pieces() {
            let mut request = null_request();
            // SAFETY: the piece lies within the caller's bytes.
            let code = unsafe {
                let bytes = ffi::RSMPI_UINT8_T;
                ffi::MPI_Isend(piece.data.cast(), piece.length as c_int, bytes, peer, tag, self.comm, &mut request)
            };
            check("MPI_Isend", code)?;
            pieces.push(request);
        }
        Ok(self.requests.insert(Pending { pieces, received: None }))
    }

    /// # Safety
    /// The bytes must be left alone until the request is complete.
    pub(crate) unsafe fn irecv(&mut self, lent: Lent, peer: c_int, tag: c_int) -> Result<i64, String> {
        let mut pieces = Vec::new();
        for piece in lent.pieces() {
            let mut request = null_request();
            // SAFETY: the piece lies within the caller's bytes.
            let code = unsafe {
                let bytes = ffi::RSMPI_UINT8_T;
                ffi::MPI_Irecv(piece.data.cast(), piece.length as c_int, bytes, peer, tag, self.comm, &mut request)
            };
            check("MPI_Irecv", code)?;
            pieces.push(request);
        }
        Ok(self.requests.insert(Pending { pieces, received: Some(0) }))
    }

    /// The bytes received if the request is complete (0 for a send); it is forgotten then.
    pub(crate) fn test(&mut self, key: i64) -> Result<Option<u64>, String> {
        let pending = self.requests.get(key)?;
        while let Some(request) = pending.pieces.last_mut() {
            let mut done = 0;
            let mut status = MaybeUninit::<MPI_Status>::zeroed();
            // SAFETY: all pointers are to live values; the status is read only where MPI has written it.
            unsafe {
                check("MPI_Test", ffi::MPI_Test(request, &mut done, status.as_mut_ptr()))?;
                if done == 0 {
                    return Ok(None);
                }
                if let Some(received) = &mut pending.received {
                    *received += received_bytes(status.as_ptr())?;
                }
            }
            pending.pieces.pop();
        }
        Ok(Some(self.requests.remove(key)?.received.unwrap_or(0)))
    }

    /// Ends MPI in good order if nobody uses it any more.
    pub(crate) fn end(mut self) {
        let mut finalized = 0;
        // SAFETY: MPI may be asked this at any time; it is ended once, with no operation under way.
        unsafe {
            ffi::MPI_Finalized(&mut finalized);
            if self.started_here && self.users == 0 && finalized == 0 {
                ffi::MPI_Comm_free(&mut self.comm);
                ffi::MPI_Finalize();
            }
        }
    }
}

impl Lent {
    /// The bytes in pieces that MPI can count; at least one, which may be empty.
    fn pieces(self) -> impl Iterator<Item = Lent> {
        (0..self.length.div_ceil(PIECE_BYTES).max(1)).map(move |index| {
            let start = index * PIECE_BYTES;
            let length = (self.length - start).min(PIECE_BYTES);
            Lent { data: self.data.wrapping_add(start as usize), length }
        })
    }
}

/// Starts MPI unless it runs; gives whether it did.
fn init() -> Result<bool, String> {
    let (mut running, mut ended, mut provided) = (0, 0, 0);
    // SAFETY: MPI may be asked this at any time; all pointers are to locals, and null stands for no arguments.
    unsafe {
        check("MPI_Initialized", ffi::MPI_Initialized(&mut running))?;
        check("MPI_Finalized", ffi::MPI_Finalized(&mut ended))?;
        if ended != 0 {
            return Err("MPI has been ended in this process and cannot be started again".into());
        }
        if running == 0 {
            let wanted = ffi::RSMPI_THREAD_MULTIPLE;
            check("MPI_Init_thread", ffi::MPI_Init_thread(null_mut(), null_mut(), wanted, &mut provided))?;
        } else {
            check("MPI_Query_thread", ffi::MPI_Query_thread(&mut provided))?;
        }
        // Calls are under one lock, so this level would do; but they come from several threads.
        if provided < ffi::RSMPI_THREAD_SERIALIZED {
            return Err(format!(
                "this MPI ({}) supports threads at level {provided} only; build it with MPI_THREAD_MULTIPLE, or let the \
                 program start it so",
                library_version()
            ));
        }
    }
    Ok(running == 0)
}

fn max_tag() -> Result<c_int, String> {
    let mut value: *mut c_void = null_mut();
    let mut found = 0;
    // SAFETY: MPI gives a pointer to its own number.
    unsafe {
        let (world, key) = (ffi::RSMPI_COMM_WORLD, ffi::MPI_TAG_UB as c_int);
        check("MPI_Comm_get_attr", ffi::MPI_Comm_get_attr(world, key, (&raw mut value).cast(), &mut found))?;
        // 32767 is what every MPI must offer.
        Ok(if found == 0 || value.is_null() { 32767 } else { value.cast::<c_int>().read() })
    }
}

fn null_request() -> MPI_Request {
    // SAFETY: the library's constant.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

/// # Safety
/// MPI must have written the status, for a receive.
unsafe fn received_bytes(status: *const MPI_Status) -> Result<u64, String> {
    let mut count = 0;
    // SAFETY: promised by the caller.
    check("MPI_Get_count", unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut count) })?;
    u64::try_from(count).map_err(|_| format!("MPI counts {count} bytes"))
}

/// Ends the job at once.
pub(crate) fn abort(code: c_int) {
    let (mut running, mut ended) = (0, 0);
    // SAFETY: MPI may be asked this at any time, and aborted while it runs.
    unsafe {
        ffi::MPI_Initialized(&mut running);
        ffi::MPI_Finalized(&mut ended);
        if running != 0 && ended == 0 {
            ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code);
        }
    }
}

/// Name and version of the library, on one line.
pub(crate) fn library_version() -> String {
    // SAFETY: the constant is one of the library.
    let capacity = unsafe { ffi::RSMPI_MAX_LIBRARY_VERSION_STRING };
    let mut buffer = vec![0u8; capacity.max(0) as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer has the length that MPI asks for. MPI may be asked this at any time.
    let code = unsafe { ffi::MPI_Get_library_version(buffer.as_mut_ptr().cast(), &mut length) };
    buffer.truncate(if code == 0 { length.max(0) as usize } else { 0 });
    let text = String::from_utf8_lossy(&buffer);
    text.split(['\n', '\0']).next().unwrap_or_default().trim().to_string()
}

/// MPI's own text for an error code.
fn check(call: &str, code: c_int) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    let mut buffer = vec![0u8; 8192];
    let mut length = 0;
    // SAFETY: the buffer is longer than any MPI's MPI_MAX_ERROR_STRING.
    let known = unsafe { ffi::MPI_Error_string(code, buffer.as_mut_ptr().cast(), &mut length) } == 0;
    buffer.truncate(if known { length.max(0) as usize } else { 0 });
    Err(format!("{call}: {} (code {code})", String::from_utf8_lossy(&buffer)))
}
