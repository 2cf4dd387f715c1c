//! Data over MPI, through a plugin that is loaded at run time, beside a mesh of our own sockets.
//!
//! MPI has no errors for lost peers and can only be polled, so liveness, aborts and wake-ups are the mesh's, and the
//! mesh also announces each message: its tag, its length, and a number. The number is the tag that MPI sees. It counts
//! the messages from one rank to another, modulo MPI's range (at least 32768), so tags of ours can never fall together
//! there however small that range is. The receive is given to MPI when the announcement meets it, and goes straight
//! into its memory. Messages of up to 1 KiB go with their announcement.
//!
//! As with MPI's own sends, that of a large message may complete only once its receive is there.
//!
//! When the world is lost, memory of operations that MPI has not completed is not freed, since MPI may still write to
//! it, and MPI is never ended (`MPI_Finalize` would wait for the lost rank): `mpirun` then ends the job with an error.

mod notice;
mod plugin;
mod waiter;

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use notice::{Body, INLINE_BYTES, Notice};
use plugin::Plugin;
use waiter::MpiWaiter;

use super::matching::{Matching, Posted, check_length};
use super::requests::Requests;
use super::tcp::{Identity, TcpOptions, TcpTransport};
use super::{MAX_MESSAGE_BYTES, Request, Tag, Transport, Waiter};
use crate::error::{Error, Result};
use crate::memory::Memory;

/// The mesh's tag of the announcements.
const NOTICES: Tag = Tag { channel: u32::MAX, sequence: 0 };

/// Bytes of a rank's entry when the addresses are exchanged through MPI: 32 random ones and an address as text.
const ENTRY_BYTES: usize = 128;

/// The transport of one rank.
pub struct MpiTransport {
    plugin: &'static Plugin,
    mesh: TcpTransport,
    waiter: Arc<MpiWaiter>,
    requests: Requests,
    /// Receives without an announcement; the other way round, `notices`.
    matching: Matching,
    notices: HashMap<(usize, Tag), VecDeque<Notice>>,
    /// What MPI is working on.
    operations: Vec<Operation>,
    /// Messages under way for [`Transport::try_recv_any`], at most one for each peer and tag.
    fetches: HashMap<(usize, Tag), Fetch>,
    /// Per peer: number of the next message to it.
    next_number: Vec<u64>,
    numbers: u64,
    closing: bool,
    closed: bool,
    failed: Option<Error>,
}

/// A send or receive that MPI is working on.
struct Operation {
    handle: i64,
    request: Request,
    /// The length, of a receive.
    expected: Option<u64>,
    /// Held for MPI.
    _memory: Memory,
}

/// A message on its way into a buffer of its own.
struct Fetch {
    handle: i64,
    bytes: Vec<u8>,
}

impl MpiTransport {
    /// Loads the plugin, starts MPI and compares its world with the launcher's. The ranks learn each other's addresses through
    /// MPI, and connect a mesh.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no plugin, or if MPI sees another world than the launcher.
    pub fn load(identity: Identity, options: &TcpOptions) -> Result<MpiTransport> {
        let plugin = start(identity)?;
        let mesh = TcpTransport::connect_through(identity, options, |address, seed| {
            exchange(plugin, identity, address, seed, Instant::now() + options.start_timeout)
        })?;
        Self::over(plugin, mesh)
    }

    /// As [`MpiTransport::load`], for ranks that a mesh connects already. They learn there whether all of them want MPI: its own
    /// start waits for every process that `mpirun` has started, for ever.
    ///
    /// # Errors
    /// As [`MpiTransport::load`]; the other ranks hear of it.
    pub fn beside(mut mesh: TcpTransport) -> Result<MpiTransport> {
        let plugin = start(mesh.identity()).inspect_err(|error| mesh.abort(error))?;
        Self::over(plugin, mesh)
    }

    fn over(plugin: &'static Plugin, mesh: TcpTransport) -> Result<MpiTransport> {
        let size = mesh.size();
        tracing::debug!(mpi = plugin.library_version(), path = ?plugin.path(), "MPI moves the data");
        let waiter = Arc::new(MpiWaiter::new(mesh.waiter()));
        Ok(MpiTransport {
            plugin,
            mesh,
            waiter,
            requests: Requests::default(),
            matching: Matching::new(size),
            notices: HashMap::new(),
            operations: Vec::new(),
            fetches: HashMap::new(),
            next_number: vec![0; size],
            numbers: plugin.max_tag()?.min(i32::MAX as u64) + 1,
            closing: false,
            closed: false,
            failed: None,
        })
    }

    fn check(&self, peer: Option<usize>) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match peer {
            Some(peer) if peer >= self.size() => {
                Err(Error::Invalid(format!("there is no rank {peer} in a world of {}", self.size())))
            }
            _ => Ok(()),
        }
    }

    /// Remembers the first error and tells the others. What MPI is working on is never freed.
    fn fail(&mut self, error: Error) -> Error {
        if let Some(first) = &self.failed {
            return first.clone();
        }
        self.failed = Some(error.clone());
        drop(self.mesh.fail(error.clone()));
        self.matching.clear();
        self.notices.clear();
        std::mem::forget(std::mem::take(&mut self.operations));
        std::mem::forget(std::mem::take(&mut self.fetches));
        self.note_outstanding();
        error
    }

    fn note_outstanding(&self) {
        self.waiter.outstanding.store(self.operations.len() + self.fetches.len(), Ordering::Release);
    }

    fn send_inner(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request> {
        if peer == self.rank() || data.len() <= INLINE_BYTES {
            // SAFETY: the bytes do not change until the request is done, which it is from the start.
            let bytes = unsafe { data.as_slice() }.to_vec();
            let notice = Notice { tag, length: bytes.len() as u64, body: Body::Here(bytes) };
            if peer == self.rank() {
                self.take_in(peer, notice)?;
            } else {
                self.announce(peer, &notice)?;
            }
            return Ok(self.requests.open_done());
        }
        let number = (self.next_number[peer] % self.numbers) as i32;
        self.next_number[peer] += 1;
        // SAFETY: the operation holds the memory; the bytes do not change until the request is done.
        let handle = unsafe { self.plugin.isend(data.as_ptr(), data.len(), peer, number) }?;
        let length = data.len() as u64;
        let request = self.requests.open();
        self.operations.push(Operation { handle, request, expected: None, _memory: data });
        self.announce(peer, &Notice { tag, length, body: Body::Mpi(number) })?;
        self.note_outstanding();
        Ok(request)
    }

    fn announce(&mut self, peer: usize, notice: &Notice) -> Result<()> {
        let request = self.mesh.send(peer, NOTICES, Memory::from_vec(notice.encode()))?;
        self.mesh.forget(request);
        Ok(())
    }

    fn recv_inner(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request> {
        let posted = Posted { request: self.requests.open(), into };
        let request = posted.request;
        match self.next_notice(peer, tag) {
            Some(notice) => self.begin(peer, notice, posted)?,
            None => {
                self.matching.post(peer, tag, posted)?;
            }
        }
        Ok(request)
    }

    fn next_notice(&mut self, peer: usize, tag: Tag) -> Option<Notice> {
        let queue = self.notices.get_mut(&(peer, tag))?;
        let notice = queue.pop_front();
        if queue.is_empty() {
            self.notices.remove(&(peer, tag));
        }
        notice
    }

    /// A message was announced.
    fn take_in(&mut self, peer: usize, notice: Notice) -> Result<()> {
        match self.matching.take_posted(peer, notice.tag) {
            Some(posted) => self.begin(peer, notice, posted)?,
            None => self.notices.entry((peer, notice.tag)).or_default().push_back(notice),
        }
        Ok(())
    }

    /// An announced message and its receive have met.
    fn begin(&mut self, peer: usize, notice: Notice, posted: Posted) -> Result<()> {
        let Posted { request, into } = posted;
        check_length(peer, notice.tag, into.len() as u64, notice.length)?;
        match notice.body {
            Body::Here(bytes) => {
                // SAFETY: the memory was given to the transport for writing until the request is complete.
                unsafe { into.as_mut_slice() }.copy_from_slice(&bytes);
                self.requests.complete(request);
            }
            Body::Mpi(number) => {
                // SAFETY: the operation holds the memory; nobody touches it until the request is complete.
                let handle = unsafe { self.plugin.irecv(into.as_ptr(), into.len(), peer, number) }?;
                self.operations.push(Operation { handle, request, expected: Some(notice.length), _memory: into });
                self.note_outstanding();
            }
        }
        Ok(())
    }

    fn take_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>> {
        if !self.fetches.contains_key(&(peer, tag)) {
            match self.next_notice(peer, tag) {
                None => return Ok(None),
                Some(Notice { body: Body::Here(bytes), .. }) => return Ok(Some(bytes)),
                Some(Notice { body: Body::Mpi(number), length, .. }) => self.fetch(peer, tag, number, length)?,
            }
        }
        let Some(fetch) = self.fetches.get(&(peer, tag)) else { return Ok(None) };
        let Some(received) = self.plugin.test(fetch.handle)? else { return Ok(None) };
        let bytes = self.fetches.remove(&(peer, tag)).map(|fetch| fetch.bytes).unwrap_or_default();
        self.note_outstanding();
        check_length(peer, tag, bytes.len() as u64, received)?;
        Ok(Some(bytes))
    }

    fn fetch(&mut self, peer: usize, tag: Tag, number: i32, length: u64) -> Result<()> {
        if length > MAX_MESSAGE_BYTES as u64 {
            return check_length(peer, tag, MAX_MESSAGE_BYTES as u64, length);
        }
        let mut bytes = vec![0; length as usize];
        // SAFETY: the fetch holds the buffer, whose bytes do not move with it.
        let handle = unsafe { self.plugin.irecv(bytes.as_mut_ptr(), bytes.len(), peer, number) }?;
        self.fetches.insert((peer, tag), Fetch { handle, bytes });
        self.note_outstanding();
        Ok(())
    }

    fn progress_inner(&mut self) -> Result<bool> {
        let mut moved = self.mesh.progress()?;
        for peer in 0..self.size() {
            while let Some(bytes) = self.mesh.try_recv_any(peer, NOTICES)? {
                let notice = Notice::decode(&bytes)
                    .map_err(|detail| Error::Protocol { peer: format!("rank {peer}"), detail })?;
                self.take_in(peer, notice)?;
                moved = true;
            }
        }
        moved |= self.reap()?;
        self.check_gone()?;
        if moved {
            self.waiter.idle.store(0, Ordering::Relaxed);
        }
        Ok(moved)
    }

    /// Completes what MPI has completed.
    fn reap(&mut self) -> Result<bool> {
        let before = self.operations.len();
        let mut index = 0;
        while let Some(operation) = self.operations.get(index) {
            let Some(received) = self.plugin.test(operation.handle)? else {
                index += 1;
                continue;
            };
            let Operation { request, expected, .. } = self.operations.swap_remove(index);
            if expected.is_some_and(|expected| expected != received) {
                return Err(Error::Protocol {
                    peer: "MPI".into(),
                    detail: format!("{received} bytes were received where {expected:?} were announced"),
                });
            }
            self.requests.complete(request);
        }
        self.note_outstanding();
        Ok(self.operations.len() != before)
    }

    /// A receive from a rank that has gone will never be met.
    fn check_gone(&self) -> Result<()> {
        let gone = |peer: &usize| self.matching.waits_for(*peer) && self.mesh.has_left(*peer);
        match (0..self.size()).find(gone) {
            Some(rank) if !self.closing => Err(Error::PeerLost {
                rank,
                cause: "it left the world while this rank waits for a message of it".into(),
            }),
            _ => Ok(()),
        }
    }

    fn close_inner(&mut self) -> Result<bool> {
        self.progress_inner()?;
        if !self.operations.is_empty() || !self.mesh.close()? {
            return Ok(false);
        }
        if !std::mem::replace(&mut self.closed, true) {
            self.plugin.change_users(-1)?;
        }
        Ok(true)
    }
}

impl Transport for MpiTransport {
    fn name(&self) -> &'static str {
        "mpi"
    }

    fn rank(&self) -> usize {
        self.mesh.rank()
    }

    fn size(&self) -> usize {
        self.mesh.size()
    }

    fn send(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request> {
        self.check(Some(peer))?;
        self.send_inner(peer, tag, data).map_err(|error| self.fail(error))
    }

    fn recv(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request> {
        self.check(Some(peer))?;
        self.recv_inner(peer, tag, into).map_err(|error| self.fail(error))
    }

    fn try_recv_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>> {
        self.check(Some(peer))?;
        self.take_any(peer, tag).map_err(|error| self.fail(error))
    }

    fn test(&mut self, request: Request) -> Result<bool> {
        self.check(None)?;
        self.requests.test(request)
    }

    fn ring(&mut self, peer: usize) -> Result<()> {
        self.check(Some(peer))?;
        self.mesh.ring(peer).map_err(|error| self.fail(error))
    }

    fn progress(&mut self) -> Result<bool> {
        self.check(None)?;
        self.progress_inner().map_err(|error| self.fail(error))
    }

    fn abort(&mut self, error: &Error) {
        self.fail(error.clone());
    }

    fn close(&mut self) -> Result<bool> {
        self.check(None)?;
        self.closing = true;
        self.close_inner().map_err(|error| self.fail(error))
    }

    fn waiter(&self) -> Arc<dyn Waiter> {
        self.waiter.clone()
    }
}

impl Drop for MpiTransport {
    fn drop(&mut self) {
        if !self.closed && self.failed.is_none() {
            let panicking = std::thread::panicking();
            let cause = if panicking { "its thread panicked" } else { "it left without a goodbye" };
            self.fail(Error::ShutDown(cause.to_owned()));
        }
    }
}

/// Name and version of the MPI that would be used. Loads it, but does not start it.
///
/// # Errors
/// As [`library`].
pub(crate) fn version() -> Result<String> {
    Ok(Plugin::get()?.library_version().trim_end().to_string())
}

/// As [`version`], and where its plugin is.
///
/// # Errors
/// [`Error::Config`] if the plugin or its MPI is not to be found.
pub fn library() -> Result<String> {
    Ok(format!("{} ({})", version()?, Plugin::get()?.path().display()))
}

/// Loads the plugin, starts MPI, and compares its world with the launcher's.
fn start(identity: Identity) -> Result<&'static Plugin> {
    let plugin = Plugin::get()?;
    plugin.init()?;
    check_world(plugin, identity)?;
    match plugin.change_users(1)? {
        1 => Ok(plugin),
        _ => Err(Error::Config(
            "MPI serves one world at a time, and cannot be used again after a failure; start the job again".into(),
        )),
    }
}

/// Refuses a world that is not the launcher's.
fn check_world(plugin: &Plugin, identity: Identity) -> Result<()> {
    let Identity { rank, size, .. } = identity;
    let (mpi_rank, mpi_size) = plugin.place()?;
    if (mpi_rank, mpi_size) == (rank, size) {
        return Ok(());
    }
    Err(Error::Config(format!(
        "the launcher started {size} ranks and this is rank {rank}, but MPI sees {mpi_size} and calls this one {mpi_rank}; \
         the plugin {} uses {}, so start the job with the mpirun of that MPI, or build the plugin for yours \
         (MPICC=… cargo build -p hvd-mpi)",
        plugin.path().display(),
        plugin.library_version()
    )))
}

/// Tells all ranks our address and random bytes through MPI, and gives the addresses of all and the bytes of rank 0.
fn exchange(
    plugin: &Plugin,
    identity: Identity,
    address: SocketAddr,
    seed: [u8; 32],
    deadline: Instant,
) -> Result<(Vec<SocketAddr>, [u8; 32])> {
    let ours = Box::new(entry(reachable(address)?, seed));
    let mut entries = vec![[0; ENTRY_BYTES]; identity.size];
    entries[identity.rank] = *ours;
    if let Err(error) = swap_entries(plugin, identity, &ours, &mut entries, deadline) {
        // MPI may still be working on them.
        std::mem::forget((ours, entries));
        return Err(error);
    }
    let addresses = entries.iter().map(address_of).collect::<Result<_>>()?;
    let mut seed = [0; 32];
    seed.copy_from_slice(&entries[0][..32]);
    Ok((addresses, seed))
}

/// Sends our entry to everybody and receives theirs. After an error MPI may still use both.
fn swap_entries(
    plugin: &Plugin,
    identity: Identity,
    ours: &[u8; ENTRY_BYTES],
    entries: &mut [[u8; ENTRY_BYTES]],
    deadline: Instant,
) -> Result<()> {
    let mut handles = Vec::new();
    for peer in (0..identity.size).filter(|peer| *peer != identity.rank) {
        // SAFETY: the caller keeps both buffers until the operations are complete, or for ever.
        unsafe {
            handles.push(plugin.irecv(entries[peer].as_mut_ptr(), ENTRY_BYTES, peer, 0)?);
            handles.push(plugin.isend(ours.as_ptr(), ENTRY_BYTES, peer, 0)?);
        }
    }
    wait_for_all(plugin, handles, deadline)
}

fn wait_for_all(plugin: &Plugin, mut handles: Vec<i64>, deadline: Instant) -> Result<()> {
    while let Some(handle) = handles.last() {
        if plugin.test(*handle)?.is_some() {
            handles.pop();
        } else if Instant::now() >= deadline {
            return Err(Error::Rendezvous("MPI did not bring the addresses of all ranks in time".into()));
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    Ok(())
}

fn entry(address: SocketAddr, seed: [u8; 32]) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    let text = address.to_string();
    entry[..32].copy_from_slice(&seed);
    entry[32..32 + text.len()].copy_from_slice(text.as_bytes());
    entry
}

fn address_of(entry: &[u8; ENTRY_BYTES]) -> Result<SocketAddr> {
    let text = String::from_utf8_lossy(&entry[32..]);
    let text = text.trim_end_matches('\0');
    text.parse().map_err(|_| Error::Rendezvous(format!("`{text}` is no address of a rank")))
}

/// An address for the others: a listener on all of a host's addresses is reached by the host's name.
fn reachable(address: SocketAddr) -> Result<SocketAddr> {
    if !address.ip().is_unspecified() {
        return Ok(address);
    }
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    let mut found = (name.as_ref(), address.port()).to_socket_addrs().into_iter().flatten();
    found.find(|found| !found.ip().is_loopback() && found.is_ipv4() == address.is_ipv4()).ok_or_else(|| {
        Error::Config(format!("the host's name `{name}` has no address beyond this host; set HVD_BIND to one"))
    })
}
