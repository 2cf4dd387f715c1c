//! Ranks that are threads of one process: tests and simulations at any world size.
//!
//! Small messages are copied when they are sent; larger ones are lent, and copied once by the receiver, straight into
//! the memory of its receive. As with the other transports, messages move only while both sides make progress.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::matching::{Matching, Posted};
use super::requests::Requests;
use super::{Request, Tag, Transport, Verdict, Waiter};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// Messages up to this length are copied by the sender, in bytes.
const EAGER_BYTES: usize = 16 << 10;

/// Random delays of messages, to show that results do not depend on timing. They are counted in calls of
/// [`Transport::progress`], so tests with delays need no sleep.
#[derive(Clone, Copy, Debug)]
pub struct Delays {
    /// Seed of the delays; a different stream is made of it for each pair of ranks.
    pub seed: u64,
    /// A message becomes visible after 0 to this many calls of `progress` on its receiver.
    pub max_polls: u32,
}

/// The transport of one rank in a world of threads.
pub struct ThreadTransport {
    rank: usize,
    hub: Arc<Hub>,
    requests: Requests,
    matching: Matching,
    /// Large sends that their receivers have not copied yet.
    lent: Vec<(Request, Arc<Lent>)>,
    delayed: Vec<DelayedQueue>,
    /// Whether this rank has said goodbye.
    closing: bool,
    failed: Option<Error>,
}

/// What the ranks of a world share.
struct Hub {
    mailboxes: Vec<Arc<Mailbox>>,
    /// The first failure, which everybody reports.
    lost: Mutex<Option<Verdict>>,
    /// The fast answer to whether `lost` is set.
    is_lost: AtomicBool,
    /// Ranks that have said goodbye with all their sends out.
    gone: Vec<AtomicBool>,
}

/// Where others leave messages for a rank, and its bell.
#[derive(Default)]
struct Mailbox {
    state: Mutex<Inbox>,
    bell: Condvar,
}

#[derive(Default)]
struct Inbox {
    messages: VecDeque<Envelope>,
    rung: bool,
}

struct Envelope {
    from: usize,
    tag: Tag,
    payload: Payload,
}

enum Payload {
    Copied(Vec<u8>),
    Lent(Arc<Lent>),
}

/// Bytes of a sender. It takes them back when it fails; the receiver copies them under the lock.
struct Lent {
    memory: Mutex<Option<Memory>>,
    done: AtomicBool,
}

/// Messages of one sender that have come but are not visible yet.
struct DelayedQueue {
    messages: VecDeque<(u32, Envelope)>,
    random: u64,
    max_polls: u32,
}

impl ThreadTransport {
    /// The transports of a world, one for each rank.
    pub fn world(size: usize) -> Vec<ThreadTransport> {
        Self::world_with_delays(size, Delays { seed: 0, max_polls: 0 })
    }

    /// A world whose messages are delayed at random. The order within each pair of ranks stays.
    pub fn world_with_delays(size: usize, delays: Delays) -> Vec<ThreadTransport> {
        let hub = Arc::new(Hub {
            mailboxes: (0..size).map(|_| Arc::default()).collect(),
            lost: Mutex::new(None),
            is_lost: AtomicBool::new(false),
            gone: (0..size).map(|_| AtomicBool::new(false)).collect(),
        });
        (0..size).map(|rank| Self::new(rank, hub.clone(), delays)).collect()
    }

    fn new(rank: usize, hub: Arc<Hub>, delays: Delays) -> Self {
        let size = hub.mailboxes.len();
        let delayed = (0..size).map(|from| DelayedQueue::new(delays, (rank * size + from) as u64)).collect();
        ThreadTransport {
            rank,
            hub,
            requests: Requests::default(),
            matching: Matching::new(size),
            lent: Vec::new(),
            delayed,
            closing: false,
            failed: None,
        }
    }

    /// Fails if the world is lost; every method begins with it.
    fn check(&mut self) -> Result<()> {
        if self.failed.is_none() && self.hub.is_lost.load(Ordering::Acquire) {
            let verdict = self.hub.lost.lock().clone();
            if let Some(verdict) = verdict {
                self.fail(verdict.into_error());
            }
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Remembers the first error, tells the others, and lets go of all memory.
    fn fail(&mut self, error: Error) -> Error {
        if self.failed.is_none() {
            self.hub.lose(Verdict::of(self.rank, &error));
            self.failed = Some(error.clone());
            self.matching.clear();
            self.delayed.iter_mut().for_each(|queue| queue.messages.clear());
            for (_, lent) in self.lent.drain(..) {
                lent.memory.lock().take();
            }
        }
        self.failed.clone().unwrap_or(error)
    }

    fn check_peer(&self, peer: usize) -> Result<()> {
        if peer < self.size() {
            return Ok(());
        }
        Err(Error::Invalid(format!("there is no rank {peer} in a world of {}", self.size())))
    }

    /// Takes a visible message in.
    fn receive(&mut self, envelope: Envelope) -> Result<()> {
        let Envelope { from, tag, payload } = envelope;
        let completed = match payload {
            Payload::Copied(bytes) => self.matching.deliver(from, tag, &bytes)?,
            Payload::Lent(lent) => {
                let completed = {
                    let mut memory = lent.memory.lock();
                    let Some(memory) = memory.take() else { return Err(left(from, "with a message half sent")) };
                    // SAFETY: the sender leaves the bytes alone until the request is done, and cannot take the memory
                    // back while we hold the lock.
                    self.matching.deliver(from, tag, unsafe { memory.as_slice() })?
                };
                lent.done.store(true, Ordering::Release);
                self.hub.mailboxes[from].ring();
                completed
            }
        };
        if let Some(request) = completed {
            self.requests.complete(request);
        }
        Ok(())
    }

    /// Completes the sends whose bytes have been copied.
    fn reap_lent(&mut self) -> bool {
        let before = self.lent.len();
        let requests = &mut self.requests;
        self.lent.retain(|(request, lent)| {
            let done = lent.done.load(Ordering::Acquire);
            if done {
                requests.complete(*request);
            }
            !done
        });
        self.lent.len() != before
    }

    /// A receive from a rank that has gone will never be met.
    fn check_gone(&mut self) -> Result<()> {
        if self.closing {
            return Ok(());
        }
        // The sender sets its flag after its last message, so look at the flags before the mailbox: see `progress`.
        for peer in 0..self.size() {
            if self.matching.waits_for(peer)
                && self.hub.gone[peer].load(Ordering::Acquire)
                && self.delayed[peer].messages.is_empty()
                && !self.hub.mailboxes[self.rank].holds_from(peer)
            {
                return Err(left(peer, "while this rank waits for a message of it"));
            }
        }
        Ok(())
    }

    fn progress_inner(&mut self) -> Result<bool> {
        let mailbox = self.hub.mailboxes[self.rank].clone();
        for envelope in mailbox.take() {
            self.delayed[envelope.from].push(envelope);
        }
        let mut moved = self.reap_lent();
        for peer in 0..self.delayed.len() {
            moved |= self.delayed[peer].tick();
            while let Some(envelope) = self.delayed[peer].pop_visible() {
                self.receive(envelope)?;
                moved = true;
            }
        }
        if self.delayed.iter().any(|queue| !queue.messages.is_empty()) {
            mailbox.ring(); // Only polling makes the rest visible.
        }
        self.check_gone()?;
        Ok(moved)
    }
}

impl Transport for ThreadTransport {
    fn name(&self) -> &'static str {
        "thread"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.hub.mailboxes.len()
    }

    fn send(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request> {
        self.check()?;
        self.check_peer(peer)?;
        let (request, payload) = if data.len() <= EAGER_BYTES {
            // SAFETY: the bytes do not change until the request is done, which it is from the start.
            (self.requests.open_done(), Payload::Copied(unsafe { data.as_slice() }.to_vec()))
        } else {
            let lent = Arc::new(Lent { memory: Mutex::new(Some(data)), done: AtomicBool::new(false) });
            let request = self.requests.open();
            self.lent.push((request, lent.clone()));
            (request, Payload::Lent(lent))
        };
        self.hub.mailboxes[peer].leave(Envelope { from: self.rank, tag, payload });
        Ok(request)
    }

    fn recv(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request> {
        self.check()?;
        self.check_peer(peer)?;
        let request = self.requests.open();
        match self.matching.post(peer, tag, Posted { request, into }) {
            Ok(true) => self.requests.complete(request),
            Ok(false) => {}
            Err(error) => return Err(self.fail(error)),
        }
        Ok(request)
    }

    fn try_recv_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>> {
        self.check()?;
        self.check_peer(peer)?;
        self.matching.take_any(peer, tag).map_err(|error| self.fail(error))
    }

    fn test(&mut self, request: Request) -> Result<bool> {
        self.check()?;
        self.requests.test(request)
    }

    fn ring(&mut self, peer: usize) -> Result<()> {
        self.check()?;
        self.check_peer(peer)?;
        self.hub.mailboxes[peer].ring();
        Ok(())
    }

    fn progress(&mut self) -> Result<bool> {
        self.check()?;
        self.progress_inner().map_err(|error| self.fail(error))
    }

    fn abort(&mut self, error: &Error) {
        self.fail(error.clone());
    }

    fn close(&mut self) -> Result<bool> {
        self.closing = true;
        self.progress()?;
        if self.lent.is_empty() && !self.hub.gone[self.rank].swap(true, Ordering::AcqRel) {
            self.hub.mailboxes.iter().for_each(|mailbox| mailbox.ring());
        }
        Ok(self.hub.gone.iter().all(|gone| gone.load(Ordering::Acquire)))
    }

    fn waiter(&self) -> Arc<dyn Waiter> {
        self.hub.mailboxes[self.rank].clone()
    }
}

impl Drop for ThreadTransport {
    fn drop(&mut self) {
        if !self.hub.gone[self.rank].load(Ordering::Acquire) {
            let cause = if std::thread::panicking() { "its thread panicked" } else { "it left without a goodbye" };
            self.fail(Error::ShutDown(cause.to_owned()));
        }
    }
}

impl Hub {
    /// Records the first failure of the world and wakes everybody.
    fn lose(&self, verdict: Verdict) {
        self.lost.lock().get_or_insert(verdict);
        self.is_lost.store(true, Ordering::Release);
        self.mailboxes.iter().for_each(|mailbox| mailbox.ring());
    }
}

impl Mailbox {
    fn leave(&self, envelope: Envelope) {
        self.state.lock().messages.push_back(envelope);
        self.bell.notify_all();
    }

    fn take(&self) -> VecDeque<Envelope> {
        std::mem::take(&mut self.state.lock().messages)
    }

    fn holds_from(&self, peer: usize) -> bool {
        self.state.lock().messages.iter().any(|envelope| envelope.from == peer)
    }

    fn ring(&self) {
        self.state.lock().rung = true;
        self.bell.notify_all();
    }
}

impl Waiter for Mailbox {
    fn wait(&self, timeout: Option<Duration>) {
        let mut inbox = self.state.lock();
        let quiet = |inbox: &mut Inbox| !inbox.rung && inbox.messages.is_empty();
        match timeout {
            Some(timeout) => drop(self.bell.wait_while_for(&mut inbox, quiet, timeout)),
            None => self.bell.wait_while(&mut inbox, quiet),
        }
        inbox.rung = false;
    }

    fn wake(&self) {
        self.ring();
    }
}

impl DelayedQueue {
    fn new(delays: Delays, stream: u64) -> Self {
        let random = delays.seed.wrapping_add(stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        DelayedQueue { messages: VecDeque::new(), random, max_polls: delays.max_polls }
    }

    fn push(&mut self, envelope: Envelope) {
        let delay = if self.max_polls == 0 { 0 } else { self.next_random() % (self.max_polls + 1) };
        self.messages.push_back((delay, envelope));
    }

    /// Counts one poll; gives whether a message came nearer.
    fn tick(&mut self) -> bool {
        match self.messages.front_mut() {
            Some((delay, _)) if *delay > 0 => {
                *delay -= 1;
                true
            }
            _ => false,
        }
    }

    fn pop_visible(&mut self) -> Option<Envelope> {
        match self.messages.front() {
            Some((0, _)) => self.messages.pop_front().map(|(_, envelope)| envelope),
            _ => None,
        }
    }

    /// SplitMix64.
    fn next_random(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 32) as u32
    }
}

fn left(rank: usize, when: &str) -> Error {
    Error::PeerLost { rank, cause: format!("it left the world {when}") }
}
