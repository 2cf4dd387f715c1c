//! The table of requests that a transport has handed out.

use super::Request;
use crate::error::{Error, Result};

/// Requests under way, in slots that are used again. A slot's generation tells an old request from its successor.
#[derive(Default)]
pub(crate) struct Requests {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

struct Slot {
    generation: u32,
    state: State,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Free,
    Open,
    /// Open, and to be freed when it is complete.
    Orphaned,
    Done,
}

impl Requests {
    /// A new request that is not complete.
    pub(crate) fn open(&mut self) -> Request {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, state: State::Free });
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.state = State::Open;
        Request(u64::from(slot.generation) << 32 | u64::from(index))
    }

    /// A request that is complete from the start.
    pub(crate) fn open_done(&mut self) -> Request {
        let request = self.open();
        self.complete(request);
        request
    }

    /// Marks a request as complete.
    pub(crate) fn complete(&mut self, request: Request) {
        match self.slot(request) {
            Some(slot) if slot.state == State::Orphaned => self.free(request),
            Some(slot) => slot.state = State::Done,
            None => {}
        }
    }

    /// Nobody will test this request: it is forgotten now or when it is complete.
    pub(crate) fn forget(&mut self, request: Request) {
        match self.slot(request) {
            Some(slot) if slot.state == State::Done => self.free(request),
            Some(slot) => slot.state = State::Orphaned,
            None => {}
        }
    }

    /// Whether a request is complete; if so it is forgotten.
    pub(crate) fn test(&mut self, request: Request) -> Result<bool> {
        let Some(slot) = self.slot(request) else {
            return Err(Error::Invalid(format!("{request:?} is unknown: it was tested after its completion")));
        };
        if slot.state != State::Done {
            return Ok(false);
        }
        self.free(request);
        Ok(true)
    }

    fn free(&mut self, request: Request) {
        if let Some(slot) = self.slot(request) {
            slot.state = State::Free;
            slot.generation = slot.generation.wrapping_add(1);
            self.free.push(request.0 as u32);
        }
    }

    fn slot(&mut self, request: Request) -> Option<&mut Slot> {
        let generation = (request.0 >> 32) as u32;
        let slot = self.slots.get_mut(request.0 as u32 as usize)?;
        (slot.generation == generation && slot.state != State::Free).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_forgotten_after_its_completion() {
        let mut requests = Requests::default();
        let first = requests.open();
        assert!(!requests.test(first).unwrap());
        requests.complete(first);
        assert!(requests.test(first).unwrap());
        let second = requests.open();
        assert_ne!(first, second);
        assert!(requests.test(first).is_err());
        assert!(!requests.test(second).unwrap());
    }

    #[test]
    fn an_orphan_makes_room() {
        let mut requests = Requests::default();
        let (early, late) = (requests.open_done(), requests.open());
        requests.forget(early);
        requests.forget(late);
        requests.complete(late);
        assert_eq!(requests.free.len(), 2);
    }
}
