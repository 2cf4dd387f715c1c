//! The connection to one peer: its socket with both halves, and what the epoll set watches it for.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::net::sockopt;

use super::TcpOptions;
use super::bell::Bell;
use super::incoming::{End, Inbox, Incoming};
use super::outgoing::Outgoing;
use crate::error::{Error, Result};

/// Most bytes to read or write on one connection before the others have their turn.
const BUDGET_BYTES: usize = 8 << 20;

/// The shortest time that the kernel takes for its own signs of life.
const MIN_KEEPALIVE: Duration = Duration::from_secs(1);

/// The connection to one peer.
pub(super) struct Link {
    pub(super) peer: usize,
    stream: TcpStream,
    pub(super) incoming: Incoming,
    pub(super) outgoing: Outgoing,
    /// Whether the epoll set watches for room to write.
    watches_writable: bool,
    /// The bytes that must be there before the kernel calls the socket readable.
    low_water_bytes: usize,
    /// How the connection has ended, if it has.
    pub(super) closed: Option<String>,
}

impl Link {
    pub(super) fn new(
        peer: usize,
        stream: TcpStream,
        generation: u64,
        options: &TcpOptions,
        bell: &Bell,
    ) -> Result<Self> {
        configure(&stream, options)
            .map_err(|error| Error::io(format!("preparing the socket to rank {peer}"), error))?;
        bell.add(peer, &stream)?;
        Ok(Link {
            peer,
            stream,
            incoming: Incoming::new(peer),
            outgoing: Outgoing::new(generation),
            watches_writable: false,
            low_water_bytes: 1,
            closed: None,
        })
    }

    /// Writes what can be written, and has the epoll set tell when the rest can; gives whether anything went out.
    pub(super) fn flush(&mut self, inbox: &mut Inbox, bell: &Bell) -> Result<bool> {
        let moved = self.outgoing.flush(&self.stream, &mut inbox.requests, BUDGET_BYTES);
        let wants = self.outgoing.is_pending() && !self.outgoing.broken;
        if wants != self.watches_writable && self.closed.is_none() {
            bell.watch_writable(self.peer, &self.stream, wants)?;
            self.watches_writable = wants;
        }
        Ok(moved)
    }

    /// Writes what can be written, for a link that the epoll set need not tell of any more.
    pub(super) fn flush_last(&mut self, inbox: &mut Inbox) {
        self.outgoing.flush(&self.stream, &mut inbox.requests, usize::MAX);
    }

    /// Reads what has come, up to the budget; gives whether anything has.
    pub(super) fn read(&mut self, inbox: &mut Inbox, bell: &Bell) -> Result<bool> {
        if self.closed.is_some() {
            return Ok(false);
        }
        let (moved, end) = self.incoming.read(&self.stream, inbox, BUDGET_BYTES)?;
        match end {
            End::Closed(how) => self.close(how, bell),
            End::Drained if self.outgoing.broken => self.close("connection lost while sending".into(), bell),
            End::Drained | End::More => self.adapt_low_water()?,
        }
        Ok(moved)
    }

    /// Whether a flush could be worth a try, for all that is known.
    pub(super) fn is_writable(&self) -> bool {
        self.outgoing.is_pending() && !self.watches_writable && !self.outgoing.broken && self.closed.is_none()
    }

    /// Whether a long message is under way whose next bytes the kernel will tell of.
    pub(super) fn is_streaming(&self) -> bool {
        self.closed.is_none() && (self.watches_writable || self.low_water_bytes > 1)
    }

    /// Whether this rank's frames are all out, or can never be.
    pub(super) fn is_flushed(&self) -> bool {
        !self.outgoing.is_pending() || self.outgoing.broken || self.closed.is_some()
    }

    /// Ends our direction: the peer sees the end after all frames.
    pub(super) fn shutdown_write(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Lets go of all memory of operations.
    pub(super) fn release(&mut self) {
        self.incoming.release();
        self.outgoing.release();
    }

    fn adapt_low_water(&mut self) -> Result<()> {
        let bytes = self.incoming.low_water_bytes();
        if bytes != self.low_water_bytes {
            set_low_water(&self.stream, bytes)
                .map_err(|error| Error::io(format!("preparing the socket to rank {}", self.peer), error))?;
            self.low_water_bytes = bytes;
        }
        Ok(())
    }

    fn close(&mut self, how: String, bell: &Bell) {
        bell.remove(&self.stream);
        self.outgoing.release();
        self.closed = Some(how);
    }
}

/// Sets `SO_RCVLOWAT` (socket(7)). An end of the connection makes it readable nevertheless.
fn set_low_water(stream: &TcpStream, bytes: usize) -> std::io::Result<()> {
    let value = bytes as libc::c_int;
    // SAFETY: the option takes an int, which lives through the call, and the descriptor is open.
    let failed = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            value,
            size_of::<libc::c_int>() as u32,
        )
    };
    if failed == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn configure(stream: &TcpStream, options: &TcpOptions) -> std::io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    if !options.peer_timeout.is_zero() {
        watch_the_way(stream, options.peer_timeout)?;
    }
    if let Some(bytes) = options.socket_buffer_bytes {
        sockopt::set_socket_send_buffer_size(stream, bytes)?;
        sockopt::set_socket_recv_buffer_size(stream, bytes)?;
    }
    Ok(())
}

/// Has the kernel give the connection up when the peer's kernel is silent: heartbeats go to neighbours only, and the way
/// to another host may be cut while theirs is not.
fn watch_the_way(stream: &TcpStream, timeout: Duration) -> std::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, (timeout / 2).max(MIN_KEEPALIVE))?;
    sockopt::set_tcp_keepintvl(stream, (timeout / 6).max(MIN_KEEPALIVE))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}
