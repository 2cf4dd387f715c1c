//! Reading frames off a connection, without blocking and with as few copies as can be.

use std::io::{ErrorKind, Read};

use super::frame::{HEADER_BYTES, Header, Kind};
use crate::error::{Error, Result};
use crate::transport::matching::{KEEPING_BYTES, Matching, Posted, check_length};
use crate::transport::requests::Requests;
use crate::transport::{Tag, Verdict};

/// Size of the buffer through which headers and short payloads are read, in bytes.
const STAGING_BYTES: usize = 64 << 10;

/// So much of a long payload is left to the kernel before anybody is woken for it, in bytes.
const LOW_WATER_BYTES: usize = 256 << 10;

/// By how much the buffer of an unexpected message grows ahead of its bytes: a length alone allocates no more.
const GROWTH_BYTES: usize = 1 << 20;

/// What the frames of all connections go into.
pub(super) struct Inbox {
    pub(super) matching: Matching,
    pub(super) requests: Requests,
    pub(super) generation: u64,
    /// Bound on the messages of one peer that nobody waits for, in bytes.
    pub(super) unexpected_limit_bytes: usize,
    /// The first abort that a peer has sent: who failed, and why.
    pub(super) abort: Option<Verdict>,
    /// Whether a ring has come since the flag was last taken.
    pub(super) rung: bool,
}

/// The reading half of a connection.
pub(super) struct Incoming {
    peer: usize,
    staging: Box<[u8]>,
    /// The part of `staging` that has been read but not taken in.
    filled: std::ops::Range<usize>,
    state: State,
    /// Whether the peer has sent its last frame.
    pub(super) goodbye: bool,
}

enum State {
    Header { bytes: [u8; HEADER_BYTES], got: usize },
    Payload { target: Target, got: usize, length: usize },
}

/// Where a payload goes.
enum Target {
    Posted(Posted),
    Unexpected(Tag, Vec<u8>),
    Cause { rank: usize, gave_up: bool, text: Vec<u8> },
}

/// How a round of reading ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing more to read now.
    Drained,
    /// The budget is used up.
    More,
    /// The connection is closed; the text says how.
    Closed(String),
}

impl Incoming {
    pub(super) fn new(peer: usize) -> Self {
        Incoming {
            peer,
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            filled: 0..0,
            state: State::header(),
            goodbye: false,
        }
    }

    /// Reads up to about `budget` bytes. Gives whether anything came, and how it ended.
    pub(super) fn read(&mut self, mut stream: impl Read, inbox: &mut Inbox, budget: usize) -> Result<(bool, End)> {
        let mut total = 0;
        while total < budget {
            match self.read_once(&mut stream) {
                Ok(0) => return Ok((total > 0, End::Closed("connection closed without a goodbye".into()))),
                Ok(count) => total += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok((total > 0, End::Drained)),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Ok((total > 0, End::Closed(format!("connection lost: {error}")))),
            }
            self.take_in(inbox)?;
        }
        Ok((true, End::More))
    }

    /// How many bytes must be there for a read to be worth a wake-up: on a link that is slower than this rank, one for every
    /// packet would cost more than the copying.
    pub(super) fn low_water_bytes(&self) -> usize {
        match &self.state {
            State::Payload { got, length, .. } if length - got >= STAGING_BYTES => LOW_WATER_BYTES.min(length - got),
            _ => 1,
        }
    }

    /// A receive for the message that is arriving right now gets the bytes so far, and the rest straight from the
    /// socket. Gives the receive back if that message is not the one.
    pub(super) fn adopt(&mut self, tag: Tag, posted: Posted) -> Result<Option<Posted>> {
        let State::Payload { target, got, length } = &mut self.state else { return Ok(Some(posted)) };
        match target {
            Target::Unexpected(its, bytes) if *its == tag => {
                check_length(self.peer, tag, posted.into.len() as u64, *length as u64)?;
                // SAFETY: the memory was given to the transport for writing until the request is complete.
                let into = unsafe { posted.into.as_mut_slice() };
                into[..*got].copy_from_slice(&bytes[..*got]);
                *target = Target::Posted(posted);
                Ok(None)
            }
            _ => Ok(Some(posted)),
        }
    }

    /// Lets go of the memory of a receive under way. Nothing can be read afterwards.
    pub(super) fn release(&mut self) {
        self.state = State::header();
        self.filled = 0..0;
    }

    /// One read: long payloads straight to where they belong, the rest into the staging buffer.
    fn read_once(&mut self, stream: &mut impl Read) -> std::io::Result<usize> {
        if let State::Payload { target, got, length } = &mut self.state
            && *length - *got >= STAGING_BYTES
        {
            let count = stream.read(target.room(*got, *length))?;
            *got += count;
            return Ok(count);
        }
        let count = stream.read(&mut self.staging)?;
        self.filled = 0..count;
        Ok(count)
    }

    /// Takes in all that is staged.
    fn take_in(&mut self, inbox: &mut Inbox) -> Result<()> {
        loop {
            let staged = &self.staging[self.filled.clone()];
            let taken = match &mut self.state {
                State::Header { bytes, got } => {
                    let count = staged.len().min(HEADER_BYTES - *got);
                    bytes[*got..*got + count].copy_from_slice(&staged[..count]);
                    *got += count;
                    count
                }
                State::Payload { target, got, length } => target.append(staged, got, *length),
            };
            self.filled.start += taken;
            if !self.finish_stage(inbox)? {
                return Ok(());
            }
        }
    }

    /// Goes on to the next state if this one has all its bytes; gives whether it did.
    fn finish_stage(&mut self, inbox: &mut Inbox) -> Result<bool> {
        match &self.state {
            State::Header { bytes, got: HEADER_BYTES } => {
                let header = Header::decode(bytes).map_err(|detail| self.violation(detail))?;
                self.state = self.begin(header, inbox)?;
            }
            State::Payload { got, length, .. } if got == length => {
                if let State::Payload { target, .. } = std::mem::replace(&mut self.state, State::header()) {
                    target.finish(self.peer, inbox);
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What a header calls for.
    fn begin(&mut self, header: Header, inbox: &mut Inbox) -> Result<State> {
        if header.generation != inbox.generation {
            let (theirs, ours) = (header.generation, inbox.generation);
            return Err(self.violation(format!("a frame of generation {theirs} in generation {ours} of the world")));
        }
        // Who waits for the goodbye of a rank that is lost has said its own, and yet gives up.
        if self.goodbye && header.kind != Kind::Abort {
            return Err(self.violation("a frame after the goodbye".into()));
        }
        let target = match header.kind {
            Kind::Ring => {
                inbox.rung = true;
                return Ok(State::header());
            }
            Kind::Goodbye => {
                self.goodbye = true;
                return Ok(State::header());
            }
            Kind::Abort => {
                let Tag { channel, sequence } = header.tag;
                Target::Cause { rank: channel as usize, gave_up: sequence == 1, text: Vec::new() }
            }
            Kind::Data => self.target_of(header, inbox)?,
        };
        let length = usize::try_from(header.length).map_err(|_| self.violation("a length beyond all memory".into()))?;
        Ok(State::Payload { target, got: 0, length })
    }

    fn target_of(&self, header: Header, inbox: &mut Inbox) -> Result<Target> {
        if let Some(posted) = inbox.matching.take_posted(self.peer, header.tag) {
            check_length(self.peer, header.tag, posted.into.len() as u64, header.length)?;
            return Ok(Target::Posted(posted));
        }
        let kept = inbox.matching.arrived_bytes(self.peer) as u64;
        if kept.saturating_add(header.length).saturating_add(KEEPING_BYTES as u64) > inbox.unexpected_limit_bytes as u64
        {
            return Err(self.violation(format!(
                "a message of {} bytes that nobody waits for, with {kept} bytes kept already, exceeds the limit of {} \
                 (TcpOptions::unexpected_limit_bytes)",
                header.length, inbox.unexpected_limit_bytes
            )));
        }
        Ok(Target::Unexpected(header.tag, Vec::new()))
    }

    fn violation(&self, detail: String) -> Error {
        Error::Protocol { peer: format!("rank {}", self.peer), detail }
    }
}

impl State {
    fn header() -> Self {
        State::Header { bytes: [0; HEADER_BYTES], got: 0 }
    }
}

impl Target {
    /// Room for the bytes from `got` on, at least one if any are missing.
    fn room(&mut self, got: usize, length: usize) -> &mut [u8] {
        match self {
            Target::Posted(posted) => {
                // SAFETY: the memory was given to the transport for writing until the request is complete.
                let into = unsafe { posted.into.as_mut_slice() };
                &mut into[got..length]
            }
            Target::Unexpected(_, bytes) | Target::Cause { text: bytes, .. } => {
                if bytes.len() == got {
                    bytes.resize(length.min(got.saturating_add(GROWTH_BYTES)), 0);
                }
                let end = bytes.len().min(length);
                &mut bytes[got..end]
            }
        }
    }

    /// Copies staged bytes in and gives how many.
    fn append(&mut self, staged: &[u8], got: &mut usize, length: usize) -> usize {
        let mut taken = 0;
        while taken < staged.len() && *got < length {
            let room = self.room(*got, length);
            let count = room.len().min(staged.len() - taken);
            room[..count].copy_from_slice(&staged[taken..taken + count]);
            *got += count;
            taken += count;
        }
        taken
    }

    /// The payload is complete.
    fn finish(self, peer: usize, inbox: &mut Inbox) {
        match self {
            Target::Posted(posted) => inbox.requests.complete(posted.request),
            Target::Unexpected(tag, bytes) => inbox.matching.keep(peer, tag, bytes),
            Target::Cause { rank, gave_up, text } => {
                let cause = || String::from_utf8_lossy(&text).into_owned();
                inbox.abort.get_or_insert_with(|| Verdict { rank, cause: cause(), gave_up });
            }
        }
    }
}

impl Inbox {
    /// Meets a receive with what has arrived; gives it back if it has to wait.
    pub(super) fn meet(&mut self, peer: usize, tag: Tag, posted: Posted) -> Result<Option<Posted>> {
        if !self.matching.has_arrived(peer, tag) {
            return Ok(Some(posted));
        }
        let request = posted.request;
        self.matching.post(peer, tag, posted)?;
        self.requests.complete(request);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::memory::Memory;

    const TAG: Tag = Tag { channel: 1, sequence: 2 };

    /// A reader, its stream, and the far end.
    fn connection() -> (Incoming, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Incoming::new(1), listener.accept().unwrap().0, far)
    }

    fn inbox() -> Inbox {
        Inbox {
            matching: Matching::new(2),
            requests: Requests::default(),
            generation: 3,
            unexpected_limit_bytes: 1 << 20,
            abort: None,
            rung: false,
        }
    }

    fn frame(kind: Kind, length: u64) -> Vec<u8> {
        Header { kind, generation: 3, tag: TAG, length }.encode().to_vec()
    }

    /// Feeds bytes and the end of the connection to a reader.
    fn feed(bytes: &[u8], inbox: &mut Inbox) -> Result<End> {
        let (mut incoming, near, mut far) = connection();
        far.write_all(bytes).unwrap();
        drop(far);
        incoming.read(&near, inbox, usize::MAX).map(|(_, end)| end)
    }

    #[test]
    fn hostile_frames_are_protocol_errors() {
        let mut other_generation = frame(Kind::Data, 1);
        other_generation[8] = 4;
        let after_goodbye = [frame(Kind::Goodbye, 0), frame(Kind::Ring, 0)].concat();
        for bytes in [
            vec![0xff; 100],
            b"GET / HTTP/1.1\r\nHost: a very long name\r\n\r\n".to_vec(),
            frame(Kind::Data, u64::MAX),
            frame(Kind::Data, (1 << 20) + 1),
            frame(Kind::Abort, 1 << 40),
            frame(Kind::Ring, 1),
            other_generation,
            after_goodbye,
        ] {
            assert!(matches!(feed(&bytes, &mut inbox()), Err(Error::Protocol { .. })), "{bytes:?}");
        }
    }

    #[test]
    fn a_rank_may_give_up_after_its_goodbye() {
        let mut inbox = inbox();
        let frames = [frame(Kind::Goodbye, 0), frame(Kind::Abort, 4), b"why?".to_vec()].concat();
        feed(&frames, &mut inbox).unwrap();
        assert_eq!(inbox.abort, Some(Verdict { rank: TAG.channel as usize, cause: "why?".into(), gave_up: false }));
    }

    #[test]
    fn messages_of_no_bytes_are_not_kept_without_end() {
        let mut inbox = inbox();
        let endless = frame(Kind::Data, 0).repeat((1 << 20) / KEEPING_BYTES + 1);
        let (mut incoming, near, mut far) = connection();
        let sender = std::thread::spawn(move || drop(far.write_all(&endless)));
        let refused = incoming.read(&near, &mut inbox, usize::MAX);
        assert!(matches!(refused, Err(Error::Protocol { .. })), "{refused:?}");
        drop(near);
        sender.join().unwrap();
    }

    #[test]
    fn a_cut_frame_is_a_closed_connection() {
        let whole = [frame(Kind::Data, 10), vec![7; 10]].concat();
        for length in 0..whole.len() {
            let mut inbox = inbox();
            assert!(matches!(feed(&whole[..length], &mut inbox), Ok(End::Closed(_))), "{length}");
            assert!(inbox.matching.take_any(1, TAG).unwrap().is_none(), "{length}");
        }
    }

    #[test]
    fn a_frame_may_come_byte_by_byte() {
        let (mut incoming, near, mut far) = connection();
        near.set_nonblocking(true).unwrap();
        far.set_nodelay(true).unwrap();
        let mut inbox = inbox();
        for byte in [frame(Kind::Data, 3), vec![1, 2, 3], frame(Kind::Ring, 0)].concat() {
            far.write_all(&[byte]).unwrap();
            incoming.read(&near, &mut inbox, usize::MAX).unwrap();
        }
        drop(far);
        near.set_nonblocking(false).unwrap();
        incoming.read(&near, &mut inbox, usize::MAX).unwrap();
        assert_eq!(inbox.matching.take_any(1, TAG).unwrap(), Some(vec![1, 2, 3]));
        assert!(inbox.rung);
    }

    #[test]
    fn a_length_alone_allocates_little() {
        let mut inbox = inbox();
        inbox.unexpected_limit_bytes = usize::MAX;
        let (mut incoming, near, mut far) = connection();
        far.write_all(&[frame(Kind::Data, 1 << 60), vec![1; 10]].concat()).unwrap();
        drop(far);
        assert!(matches!(incoming.read(&near, &mut inbox, usize::MAX), Ok((_, End::Closed(_)))));
    }

    #[test]
    fn a_receive_takes_over_a_message_half_way() {
        let (mut incoming, near, mut far) = connection();
        let mut inbox = inbox();
        far.write_all(&[frame(Kind::Data, 6), vec![1, 2, 3]].concat()).unwrap();
        incoming.read(&near, &mut inbox, 1).unwrap();
        let (request, into) = (inbox.requests.open(), Memory::zeroed(6));
        let posted = Posted { request, into: into.clone() };
        assert!(incoming.adopt(TAG, posted).unwrap().is_none());
        far.write_all(&[4, 5, 6]).unwrap();
        incoming.read(&near, &mut inbox, 1).unwrap();
        assert!(inbox.requests.test(request).unwrap());
        // SAFETY: the request is complete.
        assert_eq!(unsafe { into.as_slice() }, [1, 2, 3, 4, 5, 6]);
    }
}
