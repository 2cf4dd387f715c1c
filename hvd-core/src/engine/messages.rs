//! Messages from one rank of the world to another. They are not negotiated: both sides say beforehand what they expect.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use super::entry::{Entry, Item};
use super::submission::{Completion, Output, Submission};
use crate::collective::{Collective, Landing, ReceiveFrom, SendTo};
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::subset::channel;
use crate::transport::{Tag, Transport};

/// Messages between two ranks in one direction under one tag: they meet in the order in which each side asks for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stream {
    /// The other rank.
    pub(crate) peer: usize,
    /// Whether this rank sends.
    pub(crate) sends: bool,
    /// The user's tag.
    pub(crate) tag: u32,
}

/// The messages of one rank that are under way.
#[derive(Default)]
pub(super) struct Messages(BTreeMap<Stream, VecDeque<Message>>);

/// One side of a message.
struct Message {
    collective: Box<dyn Collective>,
    item: Item,
    /// Where what was received is.
    received: Arc<Mutex<Memory>>,
}

impl Stream {
    fn tag(self, rank: usize) -> Tag {
        // Each direction has a channel of its own: descriptions of messages go both ways.
        let upwards = self.sends == (rank < self.peer);
        let channel = if upwards { channel::MESSAGES_UP } else { channel::MESSAGES_DOWN };
        Tag { channel, sequence: self.tag }
    }
}

impl Messages {
    /// Takes in what a user wants to send or receive.
    pub(super) fn accept(&mut self, stream: Stream, rank: usize, entry: Entry, segment_bytes: usize) {
        for mut item in entry.items {
            let received = Arc::new(Mutex::new(Memory::empty()));
            match side(stream, rank, &mut item.submission, &received, segment_bytes) {
                Ok(collective) => {
                    self.0.entry(stream).or_default().push_back(Message { collective, item, received });
                }
                Err(error) => item.complete(Err(error)),
            }
        }
    }

    /// Whether any is under way.
    pub(super) fn is_busy(&self) -> bool {
        !self.0.is_empty()
    }

    /// Goes on as far as it can without waiting. Gives whether any is done.
    ///
    /// # Errors
    /// What the world is lost to. That the two sides do not fit is the message's own error.
    pub(super) fn step(&mut self, transport: &mut dyn Transport) -> Result<bool> {
        let mut moved = false;
        for queue in self.0.values_mut() {
            while let Some(message) = queue.front_mut() {
                let done = match message.collective.poll(transport) {
                    Ok(done) => done.then_some(Ok(())),
                    Err(error) if error.is_recoverable() => Some(Err(error)),
                    Err(error) => return Err(error),
                };
                let Some(result) = done else { break };
                if let Some(message) = queue.pop_front() {
                    message.complete(result);
                    moved = true;
                }
            }
        }
        self.0.retain(|_, queue| !queue.is_empty());
        Ok(moved)
    }

    /// Ends all of them with an error.
    pub(super) fn fail(&mut self, error: &Error) {
        let messages = std::mem::take(&mut self.0).into_values().flatten();
        messages.for_each(|message| message.complete(Err(error.clone())));
    }
}

impl Message {
    fn complete(self, result: Result<()>) {
        let Message { collective, item, received } = self;
        drop(collective);
        let output = std::mem::replace(&mut *received.lock(), Memory::empty());
        item.complete(result.map(|()| Completion::new(output)));
    }
}

/// This rank's side of a message.
fn side(
    stream: Stream,
    rank: usize,
    submission: &mut Submission,
    received: &Arc<Mutex<Memory>>,
    segment_bytes: usize,
) -> Result<Box<dyn Collective>> {
    let Submission { name, dtype, input, output, .. } = submission;
    let (peer, tag) = (stream.peer, stream.tag(rank));
    if stream.sends {
        return Ok(Box::new(SendTo::new(name, rank, peer, input.clone(), *dtype, tag, segment_bytes)?));
    }
    let received = received.clone();
    let landing = match std::mem::replace(output, Output::InPlace) {
        Output::Allocate(allocate) => Landing::Allocate(Box::new(move |bytes| {
            let memory = allocate(bytes);
            *received.lock() = memory.clone();
            memory
        })),
        fixed => {
            let memory = fixed.resolve(input, input.len());
            *received.lock() = memory.clone();
            Landing::Into(memory)
        }
    };
    Ok(Box::new(ReceiveFrom::new(name, rank, peer, landing, *dtype, tag, segment_bytes)?))
}
