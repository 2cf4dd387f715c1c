//! Who drives the engine: the background thread when nobody waits, else the waiting thread itself.
//!
//! A thread that waits for a handle drives the engine for a short while, so that a lone small operation needs no thread
//! switch; after that it sleeps until its operation completes. Only the background thread ever sleeps on the transport. While
//! others drive, it stays out of their way.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::founding::Members;
use super::submission::{Completion, Outcome, Promise, Submission};
use super::{Core, Demand, Entry, Item, Patience, Stream};
use crate::error::{Error, Result};
use crate::transport::Waiter;

/// How often a thread that has what it waited for tries to leave the engine in peace.
const STEPS_TO_LEAVE: usize = 4;
/// How much sooner than a waiting thread the background thread goes to sleep: the processor that it spins on may be the one
/// that the user's threads compute on.
const BACKGROUND_HASTE: u32 = 4;

/// The engine of one rank. Dropping it before [`Engine::shutdown`] fails the world.
pub struct Engine {
    shared: Arc<Shared>,
    background: Mutex<Option<JoinHandle<()>>>,
}

/// What the threads of one rank share.
struct Shared {
    core: Mutex<Core>,
    /// Submissions that the core has not seen: nobody waits for the core's lock to submit.
    inbox: Mutex<Inbox>,
    waiter: Arc<dyn Waiter>,
    drivers: Drivers,
    patience: Patience,
    /// Whether it is the background thread that holds the core's lock: it gives way to a thread that waits.
    background_drives: AtomicBool,
    /// Set once the core has ended, whether in peace or not.
    over: AtomicBool,
}

#[derive(Default)]
struct Inbox {
    demands: Vec<Demand>,
    close: bool,
    /// Why this rank gives up.
    abort: Option<Error>,
    /// Why nothing more is accepted.
    ended: Option<Error>,
}

/// Counts the waiting threads that drive or are about to; the background thread keeps out as long as there are any.
#[derive(Default)]
struct Drivers {
    count: Mutex<usize>,
    any: AtomicBool,
    none: Condvar,
}

/// One waiting thread's turn at driving.
struct Turn<'a>(&'a Drivers);

impl Drivers {
    fn enter(&self) -> Turn<'_> {
        *self.count.lock() += 1;
        self.any.store(true, Ordering::SeqCst);
        Turn(self)
    }

    fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    fn wait_for_none(&self) {
        self.none.wait_while(&mut self.count.lock(), |count| *count > 0);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut count = self.0.count.lock();
        *count -= 1;
        if *count == 0 {
            self.0.any.store(false, Ordering::SeqCst);
            self.0.none.notify_all();
        }
    }
}

/// An operation under way. Dropping it does not cancel the operation.
pub struct Handle {
    outcome: Arc<Outcome>,
    /// `None` for an operation that was done at once.
    shared: Option<Arc<Shared>>,
}

impl Handle {
    /// An operation that is done.
    pub(crate) fn done(result: Result<Completion>) -> Self {
        let outcome = Outcome::new();
        outcome.set(result);
        Handle { outcome, shared: None }
    }

    /// Whether the operation is done. Never blocks.
    pub fn poll(&self) -> bool {
        self.outcome.is_done()
    }

    /// Waits until the operation is done.
    ///
    /// # Errors
    /// [`Error::Mismatch`] where the ranks disagree on the tensor, [`Error::PeerLost`] where one of them is gone,
    /// [`Error::ShutDown`] where the world ended first.
    pub fn wait(self) -> Result<Completion> {
        if let (false, Some(shared)) = (self.poll(), &self.shared) {
            shared.wait(&self.outcome);
        }
        self.outcome.take()
    }
}

/// The operations of a group under way. Dropping it does not cancel them.
pub struct GroupHandle(Vec<Handle>);

impl GroupHandle {
    pub(crate) fn new(handles: Vec<Handle>) -> Self {
        GroupHandle(handles)
    }

    /// Whether all of them are done. Never blocks.
    pub fn poll(&self) -> bool {
        self.0.iter().all(Handle::poll)
    }

    /// Waits until all of them are done; what each gives, in the order of submission.
    ///
    /// # Errors
    /// As [`Handle::wait`].
    pub fn wait(self) -> Result<Vec<Completion>> {
        // All of them, also behind an error: their memory is the caller's again only when they are done.
        let results: Vec<_> = self.0.into_iter().map(Handle::wait).collect();
        results.into_iter().collect()
    }
}

impl Engine {
    /// Starts the background thread.
    pub(crate) fn start(core: Core, waiter: Arc<dyn Waiter>, patience: Patience) -> Result<Self> {
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            inbox: Mutex::default(),
            waiter,
            drivers: Drivers::default(),
            patience,
            background_drives: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let for_thread = shared.clone();
        let background = std::thread::Builder::new()
            .name("hvd-engine".into())
            .spawn(move || for_thread.serve())
            .map_err(|error| Error::io("cannot start the engine's thread", error))?;
        Ok(Engine { shared, background: Mutex::new(Some(background)) })
    }

    /// Hands in what the ranks of a set are to negotiate as one; a handle for each tensor. With `flush`, somebody acts on it
    /// even if nobody waits for it.
    pub(crate) fn submit(
        &self,
        set: u32,
        name: String,
        submissions: Vec<Submission>,
        flush: bool,
    ) -> Result<Vec<Handle>> {
        let (entry, handles) = self.promise(name, submissions);
        self.demand(Demand::Submit(set, entry), flush)?;
        Ok(handles)
    }

    /// Makes a process set of these ranks of the world, this one among them. Gives [`Completion::number`].
    pub(crate) fn found(&self, members: Members) -> Result<Completion> {
        let (entry, handles) = self.promise(format!("process set {members:?}"), vec![Submission::nothing()]);
        self.demand(Demand::Found(members, entry), true)?;
        first(handles)
    }

    /// Forgets a process set; returns once all its ranks have asked for it.
    pub(crate) fn remove(&self, set: u32) -> Result<()> {
        let (entry, handles) = self.promise(format!("removal of process set {set}"), vec![Submission::nothing()]);
        self.demand(Demand::Remove(set, entry), true)?;
        first(handles).map(drop)
    }

    /// Sends or receives a message.
    pub(crate) fn exchange(&self, stream: Stream, submission: Submission) -> Result<Handle> {
        let (entry, mut handles) = self.promise(submission.name.clone(), vec![submission]);
        self.demand(Demand::Exchange(stream, entry), true)?;
        handles.pop().ok_or_else(|| Error::Invalid("nothing was submitted".into()))
    }

    fn promise(&self, name: String, submissions: Vec<Submission>) -> (Entry, Vec<Handle>) {
        let promised = |submission| {
            let (promise, outcome) = Promise::new();
            let handle = Handle { outcome, shared: Some(self.shared.clone()) };
            (Item::new(submission, promise), handle)
        };
        let (items, handles) = submissions.into_iter().map(promised).unzip();
        (Entry { name, items }, handles)
    }

    fn demand(&self, demand: Demand, flush: bool) -> Result<()> {
        let mut inbox = self.shared.inbox.lock();
        if let Some(error) = &inbox.ended {
            return Err(error.clone());
        }
        inbox.demands.push(demand);
        drop(inbox);
        if flush {
            self.shared.waiter.wake();
        }
        Ok(())
    }

    /// Waits until all ranks want to shut down and all have said goodbye.
    pub(crate) fn shutdown(&self) -> Result<()> {
        self.shared.inbox.lock().close = true;
        self.shared.waiter.wake();
        self.join();
        self.shared.core.lock().failure().map_or(Ok(()), Err)
    }

    /// Fails the world and tells the peers why.
    pub(crate) fn abort(&self, error: Error) {
        // Whoever drives sees this within one step, also where the lock is not to be had for long.
        self.shared.inbox.lock().abort = Some(error.clone());
        self.shared.waiter.wake();
        // A thread that panics inside the engine holds the lock and will not give it back.
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            match self.shared.core.try_lock() {
                Some(mut core) => return self.shared.fail(&mut core, error),
                None if Instant::now() > deadline => return,
                None => std::thread::yield_now(),
            }
        }
    }

    fn join(&self) {
        let thread = self.background.lock().take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // Its panics have been turned into a failure of the world.
            drop(thread.join());
        }
    }
}

/// Waits for the only operation of an entry.
fn first(handles: Vec<Handle>) -> Result<Completion> {
    let nothing = || Error::Invalid("nothing was submitted".into());
    handles.into_iter().next().ok_or_else(nothing)?.wait()
}

impl Drop for Engine {
    fn drop(&mut self) {
        if !self.shared.over.load(Ordering::Acquire) {
            let cause = if std::thread::panicking() { "it panicked" } else { "it ended without shutting down" };
            self.abort(Error::ShutDown(cause.into()));
        }
        self.shared.waiter.wake();
        self.join();
    }
}

impl Shared {
    /// The life of the background thread.
    fn serve(&self) {
        loop {
            self.drivers.wait_for_none();
            let mut core = self.core.lock();
            self.background_drives.store(true, Ordering::SeqCst);
            core.awake(true);
            self.drive(&mut core, self.patience.shortened(BACKGROUND_HASTE), || self.drivers.any());
            self.background_drives.store(false, Ordering::SeqCst);
            let pause = core.inspect().unwrap_or_else(|error| {
                self.fail(&mut core, error);
                None
            });
            if core.is_over() {
                return;
            }
            let may_sleep = core.prepare_sleep();
            drop(core);
            if may_sleep {
                self.waiter.wait(pause);
            }
        }
    }

    /// The core, if it is free or the background thread, which gives way, has it.
    fn lock_to_drive(&self) -> Option<MutexGuard<'_, Core>> {
        match self.core.try_lock() {
            Some(core) => Some(core),
            None => self.background_drives.load(Ordering::SeqCst).then(|| self.core.lock()),
        }
    }

    /// Drives until `outcome` is there, for a short while; then leaves it to the background thread and sleeps.
    fn wait(&self, outcome: &Outcome) {
        let turn = self.drivers.enter();
        match self.lock_to_drive() {
            Some(mut core) => {
                core.awake(false);
                self.drive(&mut core, self.patience, || outcome.is_done());
                if !self.leave(&mut core) {
                    self.waiter.wake();
                }
            }
            // Another thread that waits is driving, and may be past looking into the inbox.
            None => self.waiter.wake(),
        }
        drop(turn);
        outcome.block();
    }

    /// Whether nobody need drive until something comes. Where a peer sleeps until this rank joins a round, joins it.
    fn leave(&self, core: &mut Core) -> bool {
        for _ in 0..STEPS_TO_LEAVE {
            if core.is_busy() {
                return false;
            }
            if core.prepare_sleep() {
                return true;
            }
            self.step(core);
        }
        false
    }

    /// Steps until `done`, until the engine is over, or until nothing has moved for as long as `patience` lasts. Long messages on
    /// a slow link are not worth a look.
    fn drive(&self, core: &mut Core, patience: Patience, done: impl Fn() -> bool) {
        let mut still_since = None;
        while !done() && !core.is_over() {
            if self.step(core) {
                still_since = None;
                continue;
            }
            let since = *still_since.get_or_insert_with(Instant::now);
            if patience.is_over(since) || core.is_streaming() {
                return;
            }
            patience.pause();
        }
    }

    fn step(&self, core: &mut Core) -> bool {
        let Inbox { demands, close, abort, .. } = self.take_inbox();
        let moved = !demands.is_empty();
        if let Some(error) = abort {
            core.fail(error);
        }
        let stepped = catch_unwind(AssertUnwindSafe(|| {
            demands.into_iter().for_each(|demand| core.accept(demand));
            if close {
                core.close();
            }
            core.step()
        }));
        if stepped.is_err() {
            self.fail(core, Error::ShutDown("the engine panicked; see the message above".into()));
        }
        if let Some(error) = core.ended() {
            self.end_inbox(core, error);
        }
        stepped.unwrap_or(true) || moved
    }

    fn take_inbox(&self) -> Inbox {
        let mut inbox = self.inbox.lock();
        let demands = std::mem::take(&mut inbox.demands);
        Inbox { demands, close: std::mem::take(&mut inbox.close), abort: inbox.abort.take(), ended: None }
    }

    fn fail(&self, core: &mut Core, error: Error) {
        core.fail(error);
        if let Some(error) = core.ended() {
            self.end_inbox(core, error);
        }
        self.waiter.wake();
    }

    /// Refuses what comes from now on and what came in between.
    fn end_inbox(&self, core: &Core, error: Error) {
        let mut inbox = self.inbox.lock();
        inbox.ended.get_or_insert_with(|| error.clone());
        let late = std::mem::take(&mut inbox.demands);
        drop(inbox);
        late.into_iter().for_each(|demand| demand.complete(Err(error.clone())));
        if core.is_over() {
            self.over.store(true, Ordering::Release);
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}
