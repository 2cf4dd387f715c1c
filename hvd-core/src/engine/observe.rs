//! What happens to a tensor on its way, for tests and timelines.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use super::entry::Item;
use super::submission::Submission;

/// A station of a tensor's way through the engine, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Handed to the engine by this rank.
    Submitted,
    /// Agreed on by all ranks.
    Negotiated,
    /// Being copied into the buffer in which it travels.
    CopyIn,
    /// Its first byte may be on the wire from now on.
    Wire,
    /// Being copied back to where the user wants it.
    CopyOut,
    /// Its handle is complete.
    Done,
    /// Its handle is complete, with an error, as the ranks disagree on it.
    Failed,
}

/// Is told of every station of every tensor of this rank, on the thread that drives the engine: it must be quick.
pub trait Observer: Send + Sync {
    /// A tensor is handed to the engine.
    fn submitted(&self, submission: &Submission) {
        self.event(&submission.name, Phase::Submitted);
    }

    /// `tensor` has reached `phase`, which is not [`Phase::Submitted`] where [`Observer::submitted`] hears of that.
    fn event(&self, tensor: &str, phase: Phase);

    /// A round of negotiation has ended.
    fn round(&self) {}
}

/// Who watches this rank's tensors.
#[derive(Default)]
pub(crate) struct Observers {
    /// Whether there is anybody. Where not, nothing else is touched.
    any: AtomicBool,
    /// The user's, and the timeline.
    watching: RwLock<[Option<Arc<dyn Observer>>; 2]>,
}

/// Which of the two observers.
#[derive(Clone, Copy)]
pub(crate) enum Seat {
    /// The user's.
    User,
    /// The timeline's.
    Timeline,
}

impl Observers {
    /// Puts an observer, or none, in place of the one that has been there.
    pub(crate) fn set(&self, seat: Seat, observer: Option<Arc<dyn Observer>>) {
        let mut watching = self.watching.write();
        watching[seat as usize] = observer;
        self.any.store(watching.iter().any(Option::is_some), Ordering::Release);
    }

    pub(crate) fn submitted(&self, submission: &Submission) {
        self.each(|observer| observer.submitted(submission));
    }

    pub(crate) fn tell(&self, tensor: &str, phase: Phase) {
        self.each(|observer| observer.event(tensor, phase));
    }

    pub(crate) fn tell_all(&self, items: &[Item], phase: Phase) {
        self.each(|observer| items.iter().for_each(|item| observer.event(&item.submission.name, phase)));
    }

    pub(crate) fn round(&self) {
        self.each(|observer| observer.round());
    }

    fn each(&self, tell: impl Fn(&dyn Observer)) {
        if self.any.load(Ordering::Acquire) {
            let watching = self.watching.read();
            watching.iter().flatten().for_each(|observer| tell(&**observer));
        }
    }
}
