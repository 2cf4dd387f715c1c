//! A message from one rank to another, of which both say beforehand what it is.

use super::Collective;
use super::pipe::Pipe;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::{Tag, Transport};

/// Bytes of a [`Note`].
const NOTE_BYTES: usize = 16;

/// Stands for any length in a note.
const ANY: u64 = u64::MAX;

/// What a rank tells its peer before the message.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Note {
    sends: bool,
    dtype: DType,
    /// `None`: as many as come.
    bytes: Option<u64>,
}

impl Note {
    fn encode(self) -> Memory {
        let dtype = DType::ALL.iter().position(|&dtype| dtype == self.dtype).unwrap_or_default();
        let mut note = vec![0u8; NOTE_BYTES];
        note[0] = u8::from(self.sends);
        note[1] = dtype as u8;
        note[8..].copy_from_slice(&self.bytes.unwrap_or(ANY).to_le_bytes());
        Memory::from_vec(note)
    }

    fn decode(note: &[u8; NOTE_BYTES]) -> Option<Self> {
        let [sends, dtype, 0, 0, 0, 0, 0, 0, bytes @ ..] = note else { return None };
        let bytes = Some(u64::from_le_bytes(*bytes)).filter(|&bytes| bytes != ANY);
        Some(Note { sends: *sends == 1, dtype: *DType::ALL.get(usize::from(*dtype))?, bytes })
    }

    fn fits(self, other: Self) -> bool {
        let lengths = self.bytes.zip(other.bytes);
        self.sends != other.sends && self.dtype == other.dtype && lengths.is_none_or(|(one, two)| one == two)
    }

    fn describe(self, rank: usize) -> String {
        let Note { sends, dtype, bytes } = self;
        let verb = if sends { "sends" } else { "receives" };
        let elements = bytes.map(|bytes| bytes / dtype.size() as u64);
        let count = elements.map_or("any number of".into(), |elements| elements.to_string());
        format!("rank {rank} {verb} {count} {dtype}")
    }
}

/// What both sides do: tell the peer what is to come, hear the same of it, then move the bytes.
struct Side {
    name: String,
    rank: usize,
    peer: usize,
    note: Note,
    tag: Tag,
    segment_bytes: usize,
    telling: Pipe,
    hearing: Pipe,
    /// Where the peer's note arrives.
    theirs: Memory,
    /// The message, once both notes are known.
    message: Option<Pipe>,
}

impl Side {
    fn new(name: &str, rank: usize, peer: usize, note: Note, tag: Tag, segment_bytes: usize) -> Result<Self> {
        if rank == peer {
            return Err(Error::Invalid(format!("`{name}`: rank {rank} can't exchange a message with itself")));
        }
        let theirs = Memory::zeroed(NOTE_BYTES);
        Ok(Side {
            name: name.into(),
            rank,
            peer,
            note,
            tag,
            segment_bytes,
            telling: Pipe::to(peer, &note.encode(), tag, NOTE_BYTES, 1),
            hearing: Pipe::from(peer, &theirs, tag, NOTE_BYTES, 1),
            theirs,
            message: None,
        })
    }

    /// Exchanges notes. Gives the number of bytes once it is agreed on.
    fn agree(&mut self, transport: &mut dyn Transport) -> Result<Option<usize>> {
        while self.telling.poll(transport)? | self.hearing.poll(transport)? {}
        if !(self.telling.is_done() && self.hearing.is_done()) {
            return Ok(None);
        }
        // SAFETY: no transfer of it is under way.
        let theirs = unsafe { self.theirs.as_slice() };
        let theirs = theirs.first_chunk().and_then(Note::decode).ok_or_else(|| Error::Protocol {
            peer: format!("rank {}", self.peer),
            detail: format!("bytes that are no description of `{}`", self.name),
        })?;
        if !self.note.fits(theirs) {
            let detail = format!("{}, {}", self.note.describe(self.rank), theirs.describe(self.peer));
            return Err(Error::Mismatch { name: self.name.clone(), detail });
        }
        Ok(self.note.bytes.or(theirs.bytes).map(|bytes| bytes as usize))
    }

    fn start(&mut self, memory: &Memory) {
        let pipe = if self.note.sends { Pipe::to } else { Pipe::from };
        self.message = Some(pipe(self.peer, memory, self.tag, self.segment_bytes, 1));
    }

    /// Moves the message on. `true` once it has moved.
    fn carry(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let Some(message) = &mut self.message else { return Ok(false) };
        while message.poll(transport)? {}
        Ok(message.is_done())
    }
}

/// Sends a message to one rank, which receives it with [`ReceiveFrom`].
///
/// First both tell each other in 16 bytes what they send or expect, so that both hear of it if that does not fit; then
/// the message follows in segments. Done once the peer has begun to receive and all bytes are out. The time of two
/// messages in a row; no scratch memory.
pub struct SendTo {
    side: Side,
    memory: Memory,
}

impl SendTo {
    /// Sends `memory`, elements of type `dtype`. `name` is for errors. Between the two ranks no other operation may use the tag
    /// at that time; the segment's size must be the same on both.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `peer` is this rank. [`Collective::poll`] gives [`Error::Mismatch`] if the peer expects
    /// something else: then no byte of the message has moved, and the world goes on.
    pub fn new(
        name: &str,
        rank: usize,
        peer: usize,
        memory: Memory,
        dtype: DType,
        tag: Tag,
        segment_bytes: usize,
    ) -> Result<Self> {
        let note = Note { sends: true, dtype, bytes: Some(memory.len() as u64) };
        Ok(SendTo { side: Side::new(name, rank, peer, note, tag, segment_bytes)?, memory })
    }
}

impl Collective for SendTo {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        if self.side.message.is_none() && self.side.agree(transport)?.is_some() {
            self.side.start(&self.memory);
        }
        self.side.carry(transport)
    }
}

/// Makes the memory for so many bytes.
pub type Allocate = Box<dyn FnOnce(usize) -> Memory + Send>;

/// Where a received message goes.
pub enum Landing {
    /// Here; it must be as long as this.
    Into(Memory),
    /// Into memory that is made once the length is known.
    Allocate(Allocate),
}

/// Receives the message of one rank: the other side of [`SendTo`].
pub struct ReceiveFrom {
    side: Side,
    landing: Option<Landing>,
}

impl ReceiveFrom {
    /// Receives elements of type `dtype`. Arguments and errors as for [`SendTo::new`].
    pub fn new(
        name: &str,
        rank: usize,
        peer: usize,
        landing: Landing,
        dtype: DType,
        tag: Tag,
        segment_bytes: usize,
    ) -> Result<Self> {
        let bytes = match &landing {
            Landing::Into(memory) => Some(memory.len() as u64),
            Landing::Allocate(_) => None,
        };
        let note = Note { sends: false, dtype, bytes };
        Ok(ReceiveFrom { side: Side::new(name, rank, peer, note, tag, segment_bytes)?, landing: Some(landing) })
    }
}

impl Collective for ReceiveFrom {
    fn poll(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        if self.side.message.is_none()
            && let Some(bytes) = self.side.agree(transport)?
        {
            let memory = match self.landing.take() {
                Some(Landing::Into(memory)) => memory,
                Some(Landing::Allocate(allocate)) => allocate(bytes),
                None => Memory::empty(),
            };
            self.side.start(&memory);
        }
        self.side.carry(transport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(note: &Memory) -> Option<Note> {
        // SAFETY: nobody writes to it.
        unsafe { note.as_slice() }.first_chunk().and_then(Note::decode)
    }

    #[test]
    fn notes_survive_the_wire() {
        for dtype in DType::ALL {
            for bytes in [None, Some(0), Some(u64::MAX - 1)] {
                let note = Note { sends: bytes.is_none(), dtype, bytes };
                assert_eq!(decoded(&note.encode()), Some(note));
            }
        }
        assert_eq!(Note::decode(&[1, 200, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(Note::decode(&[1, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn only_opposite_sides_of_one_message_fit() {
        let note = |sends, dtype, bytes| Note { sends, dtype, bytes };
        let sent = note(true, DType::F32, Some(12));
        assert!(sent.fits(note(false, DType::F32, Some(12))));
        assert!(sent.fits(note(false, DType::F32, None)));
        assert!(!sent.fits(note(false, DType::F32, Some(8))));
        assert!(!sent.fits(note(false, DType::I32, Some(12))));
        assert!(!sent.fits(sent));
        assert!(!note(false, DType::F32, None).fits(note(false, DType::F32, None)));
    }
}
