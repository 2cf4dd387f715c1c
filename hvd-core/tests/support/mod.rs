//! What the tests of the transports share: worlds on threads, waiting by polling, a watchdog.
#![allow(dead_code)] // Each test binary uses a part.

#[path = "../../../tests/src/skipped.rs"]
pub mod skipped;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hvd_core::transport::tcp::{Identity, TcpTransport};
use hvd_core::transport::{Request, Tag, Transport};
use hvd_core::{Memory, Result};

/// How long a test may take before it counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub type Rank = Box<dyn Transport>;

/// Runs `test` on another thread and panics if it neither ends nor fails in time.
pub fn watched(test: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let body = move || {
        let result = catch_unwind(AssertUnwindSafe(test));
        let _ = done.send(());
        result
    };
    let name = std::thread::current().name().unwrap_or("a test").to_string();
    let thread = std::thread::Builder::new().name(name).spawn(body).expect("a thread");
    ended.recv_timeout(PATIENCE).expect("the test hangs");
    if let Err(panic) = thread.join().expect("the panic was caught") {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `body` for each rank on a thread of its own and gives the results by rank.
pub fn on_each<R: Send>(world: Vec<Rank>, body: impl Fn(Rank) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = world.into_iter().map(|rank| scope.spawn(move || body(rank))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// A name that no other test and no other run has.
pub fn fresh_job() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub fn identity(rank: usize, size: usize) -> Identity {
    Identity { rank, size, generation: 0 }
}

/// Has all ranks of a world connect at the same time.
pub fn connect_all(size: usize, connect: impl Fn(usize) -> TcpTransport + Sync) -> Vec<Rank> {
    std::thread::scope(|scope| {
        let connect = &connect;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || connect(rank))).collect();
        threads.into_iter().map(|thread| Box::new(thread.join().expect("a rank cannot connect")) as Rank).collect()
    })
}

pub fn tag(sequence: u32) -> Tag {
    Tag { channel: 7, sequence }
}

pub fn bytes(memory: &Memory) -> &[u8] {
    // SAFETY: the tests read only memory whose requests are complete.
    unsafe { memory.as_slice() }
}

pub fn memory(bytes: &[u8]) -> Memory {
    Memory::from_vec(bytes.to_vec())
}

/// Drives a transport until `done` gives something, sleeping in between.
pub fn until<T>(rank: &mut dyn Transport, mut done: impl FnMut(&mut dyn Transport) -> Result<Option<T>>) -> Result<T> {
    let waiter = rank.waiter();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let moved = rank.progress()?;
        if let Some(value) = done(rank)? {
            return Ok(value);
        }
        if !moved {
            waiter.wait(Some(Duration::from_secs(5)));
        }
        assert!(Instant::now() < deadline, "rank {} waits in vain", rank.rank());
    }
}

pub fn wait(rank: &mut dyn Transport, request: Request) -> Result<()> {
    until(rank, |rank| Ok(rank.test(request)?.then_some(())))
}

pub fn wait_all(rank: &mut dyn Transport, requests: impl IntoIterator<Item = Request>) -> Result<()> {
    requests.into_iter().try_for_each(|request| wait(rank, request))
}

pub fn receive_any(rank: &mut dyn Transport, peer: usize, tag: Tag) -> Result<Vec<u8>> {
    until(rank, |rank| rank.try_recv_any(peer, tag))
}

/// Says goodbye and waits for that of the others.
pub fn close(mut rank: Rank) {
    until(&mut *rank, |rank| Ok(rank.close()?.then_some(()))).expect("closing");
}

/// Drives a transport until it fails and gives the error.
pub fn failure(rank: &mut dyn Transport) -> hvd_core::Error {
    until::<()>(rank, |_| Ok(None)).expect_err("the world cannot come to an end otherwise")
}
