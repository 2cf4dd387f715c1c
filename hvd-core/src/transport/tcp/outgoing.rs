//! Writing frames to a connection, without blocking: header and payload of several messages in one call.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::net::TcpStream;

use super::frame::{HEADER_BYTES, Header, Kind, MAX_CAUSE_BYTES};
use crate::memory::Memory;
use crate::transport::requests::Requests;
use crate::transport::{Request, Tag, Verdict};

/// Most messages of one write.
const BATCH: usize = 16;

/// Most bytes of one write: the kernel takes no more than 2^31 at once, and copies no more than its buffer holds.
const WRITE_BYTES: usize = 8 << 20;

/// The writing half of a connection.
pub(super) struct Outgoing {
    generation: u64,
    queue: VecDeque<Message>,
    /// Set when a write has failed: nothing more can be sent.
    pub(super) broken: bool,
}

struct Message {
    header: [u8; HEADER_BYTES],
    payload: Memory,
    /// Bytes of header and payload that are out.
    sent: usize,
    request: Option<Request>,
}

impl Outgoing {
    pub(super) fn new(generation: u64) -> Self {
        Outgoing { generation, queue: VecDeque::new(), broken: false }
    }

    /// Whether something waits to be written.
    pub(super) fn is_pending(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Queues a message.
    pub(super) fn push_data(&mut self, tag: Tag, payload: Memory, request: Request) {
        self.push(Kind::Data, tag, payload, Some(request));
    }

    /// Queues a frame without payload.
    pub(super) fn push_signal(&mut self, kind: Kind) {
        self.push(kind, Tag { channel: 0, sequence: 0 }, Memory::empty(), None);
    }

    /// Queues an abort, right after the message that is half out: the others will not be missed.
    pub(super) fn push_abort(&mut self, verdict: &Verdict) {
        let half_out = self.queue.pop_front().filter(|message| message.sent > 0);
        self.queue.clear();
        self.queue.extend(half_out);
        let Verdict { rank, cause, gave_up } = verdict;
        let mut end = cause.len().min(MAX_CAUSE_BYTES);
        while !cause.is_char_boundary(end) {
            end -= 1;
        }
        let payload = Memory::from_vec(cause.as_bytes()[..end].to_vec());
        let tag = Tag { channel: *rank as u32, sequence: u32::from(*gave_up) };
        self.push(Kind::Abort, tag, payload, None);
    }

    /// Forgets what has not been written and lets go of its memory.
    pub(super) fn release(&mut self) {
        self.queue.clear();
    }

    /// Writes what the socket takes, up to about `budget` bytes; gives whether it took anything.
    pub(super) fn flush(&mut self, stream: &TcpStream, requests: &mut Requests, budget: usize) -> bool {
        let mut total = 0;
        while self.is_pending() && !self.broken && total < budget {
            match self.write_once(stream) {
                Ok(count) => {
                    total += count;
                    self.advance(count, requests);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.broken = true, // The reading half finds out why.
            }
        }
        total > 0
    }

    fn push(&mut self, kind: Kind, tag: Tag, payload: Memory, request: Option<Request>) {
        let header = Header { kind, generation: self.generation, tag, length: payload.len() as u64 };
        self.queue.push_back(Message { header: header.encode(), payload, sent: 0, request });
    }

    fn write_once(&self, stream: &TcpStream) -> std::io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); 2 * BATCH];
        let mut used = 0;
        let mut bytes = 0;
        for message in self.queue.iter().take(BATCH) {
            for part in message.rest() {
                let part = &part[..part.len().min(WRITE_BYTES - bytes)];
                bytes += part.len();
                slices[used] = IoSlice::new(part);
                used += 1;
            }
            if bytes == WRITE_BYTES {
                break;
            }
        }
        let no_signal = rustix::net::SendFlags::NOSIGNAL.bits() as i32;
        socket2::SockRef::from(stream).send_vectored_with_flags(&slices[..used], no_signal)
    }

    /// Counts bytes as written and completes the sends that are out.
    fn advance(&mut self, mut count: usize, requests: &mut Requests) {
        while let Some(first) = self.queue.front_mut() {
            let step = count.min(first.left());
            first.sent += step;
            count -= step;
            if first.left() > 0 {
                return;
            }
            if let Some(request) = first.request {
                requests.complete(request);
            }
            self.queue.pop_front();
        }
    }
}

impl Message {
    fn left(&self) -> usize {
        HEADER_BYTES + self.payload.len() - self.sent
    }

    /// The parts of header and payload that are not out yet.
    fn rest(&self) -> [&[u8]; 2] {
        // SAFETY: the bytes were lent to the transport and do not change until the request is complete.
        let payload = unsafe { self.payload.as_slice() };
        [&self.header[self.sent.min(HEADER_BYTES)..], &payload[self.sent.saturating_sub(HEADER_BYTES)..]]
    }
}
