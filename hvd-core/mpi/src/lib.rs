//! rsmpi behind a small C interface: the only code of the project that links MPI.
//!
//! `hvd-core` loads this library at run time, so that one build of everything else serves machines with no MPI, Open MPI
//! or MPICH; only this library is built once for each. The interface knows bytes, ranks and tags, on a communicator of
//! its own.
//!
//! Functions that can fail give a negative number then, and [`hvd_mpi_last_error`] says why. They may be called from
//! any thread; a lock lets one in at a time.
#![deny(missing_docs)]

mod job;
mod slab;

use std::ffi::c_int;
use std::sync::{Mutex, MutexGuard, PoisonError};

use job::{Job, Lent};

/// Changes with every change of the functions or their meaning.
const ABI_VERSION: u32 = 1;

/// What the functions that can fail give when they do.
const FAILED: i64 = -1;

static JOB: Mutex<Option<Job>> = Mutex::new(None);
static LAST_ERROR: Mutex<String> = Mutex::new(String::new());

/// The version of this interface; to be compared before anything else is called.
#[unsafe(no_mangle)]
pub extern "C" fn hvd_mpi_abi_version() -> u32 {
    ABI_VERSION
}

/// Starts MPI with support for threads. Does nothing if it was started here before. 0, or negative on failure.
#[unsafe(no_mangle)]
pub extern "C" fn hvd_mpi_init() -> i64 {
    let mut job = lock(&JOB);
    if job.is_some() {
        return 0;
    }
    match Job::start() {
        Ok(started) => {
            *job = Some(started);
            0
        }
        Err(error) => failed(error),
    }
}

/// This process's rank.
#[unsafe(no_mangle)]
pub extern "C" fn hvd_mpi_rank() -> i64 {
    with_job(|job| Ok(i64::from(job.rank)))
}

/// Number of ranks.
#[unsafe(no_mangle)]
pub extern "C" fn hvd_mpi_size() -> i64 {
    with_job(|job| Ok(i64::from(job.size)))
}

/// The highest tag that MPI takes.
#[unsafe(no_mangle)]
pub extern "C" fn hvd_mpi_max_tag() -> i64 {
    with_job(|job| Ok(i64::from(job.max_tag)))
}

/// Starts to send `length` bytes (`MPI_Isend`, in pieces where they are more than MPI counts). Gives a request.
///
/// # Safety
/// `data` must be valid for reads, and the bytes must not change, until the request has tested as complete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hvd_mpi_isend(data: *const u8, length: u64, peer: c_int, tag: c_int) -> i64 {
    // SAFETY: promised by the caller.
    with_job(|job| unsafe { job.isend(Lent { data: data.cast_mut(), length }, peer, tag) })
}

/// Starts to receive `length` bytes (`MPI_Irecv`, in the pieces of [`hvd_mpi_isend`]). Gives a request.
///
/// # Safety
/// `into` must be valid for writes, and nobody else may touch the bytes, until the request has tested as complete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hvd_mpi_irecv(into: *mut u8, length: u64, peer: c_int, tag: c_int) -> i64 {
    // SAFETY: promised by the caller.
    with_job(|job| unsafe { job.irecv(Lent { data: into, length }, peer, tag) })
}

/// Whether a request is complete (`MPI_Test`): 1 if so, and the request is forgotten; else 0. Of a receive, `received`
/// gets the length.
///
/// # Safety
/// `received` must be valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hvd_mpi_test(request: i64, received: *mut u64) -> i64 {
    with_job(|job| {
        let Some(bytes) = job.test(request)? else { return Ok(0) };
        // SAFETY: promised by the caller.
        unsafe { received.write(bytes) };
        Ok(1)
    })
}

/// Counts one more (`1`) or one fewer (`-1`) user of MPI. MPI ends in good order (`MPI_Finalize`, when the process
/// exits) only if nobody uses it any more: otherwise this rank leaves a job that others still work in, they may never
/// come to the end, and to wait for them would hang.
#[unsafe(no_mangle)]
pub extern "C" fn hvd_mpi_use(change: i64) -> i64 {
    with_job(|job| {
        job.users += change;
        Ok(job.users)
    })
}

/// Ends all processes of the job at once (`MPI_Abort`).
#[unsafe(no_mangle)]
pub extern "C" fn hvd_mpi_abort(code: c_int) {
    job::abort(code);
}

/// Copies the name and version of the MPI library into `buffer`. Gives its length.
///
/// # Safety
/// `buffer` must be valid for writes of `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hvd_mpi_library_version(buffer: *mut u8, capacity: u64) -> u64 {
    // SAFETY: promised by the caller.
    unsafe { copy_out(&job::library_version(), buffer, capacity) }
}

/// Copies the text of the last failure into `buffer`. Gives its length.
///
/// # Safety
/// `buffer` must be valid for writes of `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hvd_mpi_last_error(buffer: *mut u8, capacity: u64) -> u64 {
    // SAFETY: promised by the caller.
    unsafe { copy_out(&lock(&LAST_ERROR), buffer, capacity) }
}

fn with_job(call: impl FnOnce(&mut Job) -> Result<i64, String>) -> i64 {
    let mut job = lock(&JOB);
    let result = match job.as_mut() {
        Some(job) => call(job),
        None => Err("MPI has not been started".into()),
    };
    result.unwrap_or_else(failed)
}

/// Runs when the process exits.
extern "C" fn at_exit() {
    // A thread that is still inside MPI will not come back: leave without a goodbye.
    if let Ok(mut job) = JOB.try_lock()
        && let Some(job) = job.take()
    {
        job.end();
    }
}

fn failed(error: String) -> i64 {
    *lock(&LAST_ERROR) = error;
    FAILED
}

/// # Safety
/// `buffer` must be valid for writes of `capacity` bytes.
unsafe fn copy_out(text: &str, buffer: *mut u8, capacity: u64) -> u64 {
    let length = text.len().min(capacity as usize);
    // SAFETY: promised by the caller; `length` is within both.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), buffer, length) };
    length as u64
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
