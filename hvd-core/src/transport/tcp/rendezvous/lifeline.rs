//! The connections to rank 0 during the start: who fails tells, who dies is noticed.

use std::time::{Duration, Instant};

use super::doorman::Doorman;
use super::note::Note;
use super::rendezvous;
use super::stream::Stream;
use crate::error::{Error, Result};

/// How long a note that has begun to arrive, or is being sent, may take.
const NOTE_TIMEOUT: Duration = Duration::from_secs(5);

/// Rank 0 knows best who is missing: what it says is awaited this long after the deadline.
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// This rank's part of the connections to rank 0.
pub(super) enum Lifeline {
    /// There are none: the ranks met by other means.
    None,
    /// Rank 0's ends, by rank.
    Host(Vec<Guest>),
    /// Another rank's end, and whether rank 0 has given the go.
    Guest(Stream, bool),
}

/// Rank 0's end of the connection to another rank.
pub(super) struct Guest {
    pub(super) rank: usize,
    pub(super) stream: Stream,
    pub(super) ready: bool,
}

impl Lifeline {
    /// The connections to watch.
    pub(super) fn streams(&self) -> Vec<&Stream> {
        match self {
            Lifeline::None => Vec::new(),
            Lifeline::Host(guests) => guests.iter().map(|guest| &guest.stream).collect(),
            Lifeline::Guest(stream, _) => vec![stream],
        }
    }

    /// Hears what the connections at these positions have to say.
    pub(super) fn hear(&mut self, positions: &[usize]) -> Result<()> {
        match self {
            Lifeline::None => Ok(()),
            Lifeline::Host(guests) => positions.iter().try_for_each(|position| guests[*position].hear()),
            Lifeline::Guest(stream, go) if !positions.is_empty() => {
                *go = hear_from_host(stream)?;
                Ok(())
            }
            Lifeline::Guest(..) => Ok(()),
        }
    }

    /// Says that this rank's connections stand, and waits until everybody's do.
    pub(super) fn finish<T: Send + 'static>(&mut self, doorman: &Doorman<T>, mut deadline: Instant) -> Result<()> {
        if let Lifeline::Guest(stream, _) = self {
            deadline += GRACE;
            // If rank 0 is gone, what it said before is still to be heard.
            let _ = Note::Ready.send(stream, Instant::now() + NOTE_TIMEOUT);
        }
        while !self.is_complete() {
            if Instant::now() >= deadline {
                return Err(rendezvous(self.late()));
            }
            let positions = doorman.wait(&self.streams(), deadline)?;
            self.hear(&positions)?;
        }
        if let Lifeline::Host(guests) = self {
            for guest in guests {
                // A rank that has died since is noticed by all, as in every world that stands.
                let _ = Note::Go.send(&mut guest.stream, Instant::now() + NOTE_TIMEOUT);
            }
        }
        Ok(())
    }

    /// Tells the others, as far as they can be reached, why the start has failed.
    pub(super) fn tell_failure(&mut self, rank: usize, error: &Error) {
        let text = match error {
            Error::Rendezvous(text) => text.clone(),
            other => format!("rank {rank} failed: {other}"),
        };
        let note = Note::Failed { text };
        let deadline = Instant::now() + NOTE_TIMEOUT;
        match self {
            Lifeline::None => {}
            Lifeline::Host(guests) => guests.iter_mut().for_each(|guest| {
                let _ = note.send(&mut guest.stream, deadline);
            }),
            Lifeline::Guest(stream, _) => {
                let _ = note.send(stream, deadline);
            }
        }
    }

    fn is_complete(&self) -> bool {
        match self {
            Lifeline::None => true,
            Lifeline::Host(guests) => guests.iter().all(|guest| guest.ready),
            Lifeline::Guest(_, go) => *go,
        }
    }

    fn late(&self) -> String {
        match self {
            Lifeline::Host(guests) => {
                let late: Vec<_> = guests.iter().filter(|guest| !guest.ready).map(|guest| guest.rank).collect();
                format!("ranks {late:?} did not connect with all others in time")
            }
            _ => "rank 0 did not say in time that all ranks are connected".into(),
        }
    }
}

impl Guest {
    /// Takes a note of this rank, which can only be that it is ready or has failed.
    pub(super) fn hear(&mut self) -> Result<()> {
        match Note::receive(&mut self.stream, Instant::now() + NOTE_TIMEOUT) {
            Ok(Note::Ready) => {
                self.ready = true;
                Ok(())
            }
            Ok(Note::Failed { text }) => Err(rendezvous(text)),
            Ok(other) => Err(rendezvous(format!("rank {} said {other:?} out of turn", self.rank))),
            Err(error) => Err(rendezvous(format!("lost rank {} during the start: {error}", self.rank))),
        }
    }
}

/// Takes a note of rank 0; gives whether it was the go.
fn hear_from_host(stream: &mut Stream) -> Result<bool> {
    match Note::receive(stream, Instant::now() + NOTE_TIMEOUT) {
        Ok(Note::Go) => Ok(true),
        Ok(Note::Failed { text }) => Err(rendezvous(text)),
        Ok(other) => Err(rendezvous(format!("rank 0 said {other:?} out of turn"))),
        Err(error) => Err(rendezvous(format!("lost rank 0 during the start: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::stream::Listener;
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};
    use std::os::unix::net::UnixStream;

    #[test]
    fn rank_0_says_who_was_late_after_the_deadline() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(Listener::tcp).expect("a listener");
        let doorman = Doorman::<()>::new(listener, |_, _, _| Ok(())).expect("a doorman");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let now = Instant::now();
        let late = Note::Failed { text: "ranks [1] are late".into() };
        late.send(&mut Stream::Unix(theirs), now + Duration::from_secs(60)).expect("sending");
        let error = Lifeline::Guest(Stream::Unix(ours), false).finish(&doorman, now).expect_err("a failed start");
        assert!(error.to_string().contains("ranks [1] are late"), "{error}");
    }
}
