//! What `fuzz/` and the property tests throw at the readers of frames.

use std::io::Read;

use super::frame::{HEADER_BYTES, Header, Kind};
use super::incoming::{End, Inbox, Incoming};
use crate::memory::Memory;
use crate::transport::Tag;
use crate::transport::matching::{Matching, Posted};
use crate::transport::requests::Requests;

/// The peer whose bytes are read.
const PEER: usize = 1;

/// Most bytes that may be kept for nobody.
const LIMIT: usize = 1 << 16;

/// Reads `data` as what a peer sends, in pieces whose length the first byte gives, while two receives wait.
///
/// # Panics
/// If more is kept than allowed, or a receive completes without its bytes.
pub fn frames(data: &[u8]) {
    let (&step, data) = data.split_first().unwrap_or((&0, &[]));
    let mut inbox = Inbox {
        matching: Matching::new(2),
        requests: Requests::default(),
        generation: 0,
        unexpected_limit_bytes: LIMIT,
        abort: None,
        rung: false,
    };
    let mut incoming = Incoming::new(PEER);
    let posted = [3usize, 4096].map(|length| post(&mut inbox, length));
    let mut pieces = Pieces { data, step: usize::from(step) + 1 };
    let outcome = incoming.read(&mut pieces, &mut inbox, usize::MAX);
    assert!(inbox.matching.arrived_bytes(PEER) <= LIMIT, "more is kept than allowed");
    assert!(!matches!(outcome, Ok((_, End::Drained | End::More))), "the end was not seen");
    let received: usize =
        posted.iter().filter(|(request, _)| matches!(inbox.requests.test(*request), Ok(true))).map(|p| p.1).sum();
    assert!(received <= data.len(), "a receive is complete without its bytes");
}

/// Posts a receive; its tag is its length.
fn post(inbox: &mut Inbox, length: usize) -> (crate::transport::Request, usize) {
    let request = inbox.requests.open();
    let posted = Posted { request, into: Memory::zeroed(length) };
    let waits = inbox.matching.post(PEER, Tag { channel: 0, sequence: length as u32 }, posted);
    assert!(matches!(waits, Ok(false)), "nothing has come yet");
    (request, length)
}

/// Bytes that come in pieces, and then an end.
struct Pieces<'a> {
    data: &'a [u8],
    step: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.step.min(self.data.len()).min(into.len());
        let (now, later) = self.data.split_at(count);
        into[..count].copy_from_slice(now);
        self.data = later;
        Ok(count)
    }
}

/// Frames as a peer may well send them, for tests to spoil.
pub fn valid_frames() -> Vec<u8> {
    let frame = |kind, sequence, payload: &[u8]| {
        let tag = Tag { channel: 0, sequence };
        let header: [u8; HEADER_BYTES] = Header { kind, generation: 0, tag, length: payload.len() as u64 }.encode();
        [&header, payload].concat()
    };
    let frames = [
        frame(Kind::Data, 3, &[1, 2, 3]),
        frame(Kind::Ring, 0, &[]),
        frame(Kind::Data, 9, &[7; 100]),
        frame(Kind::Data, 4096, &[5; 4096]),
        frame(Kind::Abort, 0, b"because"),
        frame(Kind::Goodbye, 0, &[]),
    ];
    [&[40], &frames.concat()[..]].concat()
}
