//! Negotiation among many ranks on one thread, over a network with a virtual clock.
//!
//! The ranks run the engine's own negotiation; only time is made up. A message of `b` bytes takes `latency + b / bandwidth`
//! (Hockney, "The communication challenge for MPP", 1994), and the messages of one rank leave one after the other. Computing
//! costs nothing.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use smallvec::smallvec;

use super::message::{Signature, SignatureKind, TensorSignature};
use super::negotiation::{Negotiation, Verdict};
use super::submission::Allreduce;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::transport::matching::{Matching, Posted};
use crate::transport::requests::Requests;
use crate::transport::{Request, Tag, Transport, Waiter};

/// How long messages take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// From the send of an empty message to its arrival, in nanoseconds.
    pub latency_ns: u64,
    /// In bytes per nanosecond (GB/s).
    pub bandwidth: f64,
}

/// What it takes until all ranks know that all tensors are ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Rounds of negotiation.
    pub rounds: usize,
    /// Messages one after the other on the longest way through the ranks.
    pub critical_messages: usize,
    /// Bytes of those messages.
    pub critical_bytes: usize,
    /// The most messages that one rank sends.
    pub sent_messages: usize,
    /// The most bytes that one rank sends.
    pub sent_bytes: usize,
    /// Virtual time, in nanoseconds.
    pub nanos: u64,
}

/// The ranks of one world.
pub struct Simulation {
    ranks: Vec<Negotiation>,
    ports: Vec<Port>,
    air: Arc<Mutex<Air>>,
}

/// All that is in the air and what each rank has seen.
struct Air {
    network: Network,
    /// Messages under way, by time of arrival; the number keeps those of one moment apart.
    flying: BTreeMap<(u64, usize), Message>,
    count: usize,
    nodes: Vec<Node>,
}

struct Message {
    from: usize,
    to: usize,
    tag: Tag,
    bytes: Vec<u8>,
    way: Way,
}

/// One rank's place in time.
struct Node {
    now: u64,
    /// When the message before has left.
    free: u64,
    /// The way that determined `now`.
    way: Way,
    sent: Way,
    matching: Matching,
    requests: Requests,
}

/// A number of messages and their bytes.
#[derive(Clone, Copy, Default)]
struct Way {
    messages: usize,
    bytes: usize,
}

impl Way {
    fn plus(self, bytes: usize) -> Self {
        Way { messages: self.messages + 1, bytes: self.bytes + bytes }
    }
}

impl Simulation {
    /// `size` ranks that have agreed on nothing yet.
    pub fn new(size: usize, cache_capacity: usize, network: Network) -> Self {
        let node = |_| Node {
            now: 0,
            free: 0,
            way: Way::default(),
            sent: Way::default(),
            matching: Matching::new(size),
            requests: Requests::default(),
        };
        let nodes = (0..size).map(node).collect();
        let air = Arc::new(Mutex::new(Air { network, flying: BTreeMap::new(), count: 0, nodes }));
        Simulation {
            ranks: (0..size).map(|rank| Negotiation::new(rank, (0..size).collect(), cache_capacity, None)).collect(),
            ports: (0..size).map(|rank| Port { rank, size, air: air.clone() }).collect(),
            air,
        }
    }

    /// Every rank submits an allreduce under each of `names` at the same moment; goes on until all of them know that all are
    /// ready. Names that have been agreed on before cost a bit each.
    ///
    /// # Errors
    /// [`Error::Protocol`] where the negotiation fails or comes to a stop.
    pub fn negotiate(&mut self, names: &[String]) -> Result<Cost> {
        self.air.lock().start_clocks();
        let mut missing: Vec<HashSet<&str>> = vec![names.iter().map(String::as_str).collect(); self.ranks.len()];
        let mut rounds = 0;
        for (rank, missing) in missing.iter_mut().enumerate() {
            names.iter().for_each(|name| self.ranks[rank].submit(name, signature(), Vec::new()));
            rounds += self.poll(rank, missing)?;
        }
        while missing.iter().any(|names| !names.is_empty()) {
            let arrived = self.air.lock().deliver_next()?;
            let rank = arrived.ok_or_else(|| stuck("no message is under way, and tensors are missing"))?;
            rounds += self.poll(rank, &mut missing[rank])?;
        }
        let mut cost = self.air.lock().cost();
        cost.rounds = rounds / self.ranks.len();
        Ok(cost)
    }

    /// Lets a rank look at what has arrived; gives the rounds that it saw end.
    fn poll(&mut self, rank: usize, missing: &mut HashSet<&str>) -> Result<usize> {
        let mut rounds = 0;
        while let Some(verdicts) = self.ranks[rank].poll(&mut self.ports[rank])? {
            rounds += 1;
            for verdict in verdicts {
                match verdict {
                    Verdict::Ready { agreement, .. } => drop(missing.remove(agreement.name.as_str())),
                    Verdict::Refused { error, .. } => return Err(error),
                    Verdict::Joined { .. } | Verdict::Founded(_) => {}
                }
            }
        }
        Ok(rounds)
    }
}

fn signature() -> Signature {
    let tensor = TensorSignature { dtype: DType::F32, shape: smallvec![1024], place: None };
    Signature {
        kind: SignatureKind::Allreduce(Allreduce::sum().into()),
        device: Device::Cpu,
        tensors: smallvec![tensor],
    }
}

fn stuck(detail: &str) -> Error {
    Error::Protocol { peer: "the simulated ranks".into(), detail: detail.into() }
}

impl Air {
    /// All ranks begin at once, when the last of what came before is over.
    fn start_clocks(&mut self) {
        for node in &mut self.nodes {
            (node.now, node.free, node.way, node.sent) = (0, 0, Way::default(), Way::default());
        }
    }

    fn send(&mut self, from: usize, to: usize, tag: Tag, bytes: Vec<u8>) {
        let node = &mut self.nodes[from];
        let leaves = node.now.max(node.free);
        let passes = (bytes.len() as f64 / self.network.bandwidth) as u64;
        node.free = leaves + passes;
        node.sent = node.sent.plus(bytes.len());
        let way = node.way.plus(bytes.len());
        self.count += 1;
        let arrives = leaves + passes + self.network.latency_ns;
        self.flying.insert((arrives, self.count), Message { from, to, tag, bytes, way });
    }

    /// Brings the next message to its rank and gives that rank.
    fn deliver_next(&mut self) -> Result<Option<usize>> {
        let Some(((time, _), message)) = self.flying.pop_first() else { return Ok(None) };
        let node = &mut self.nodes[message.to];
        if time > node.now {
            (node.now, node.way) = (time, message.way);
        }
        if let Some(request) = node.matching.deliver(message.from, message.tag, &message.bytes)? {
            node.requests.complete(request);
        }
        Ok(Some(message.to))
    }

    fn cost(&self) -> Cost {
        let last = self.nodes.iter().max_by_key(|node| node.now);
        let way = last.map(|node| node.way).unwrap_or_default();
        Cost {
            rounds: 0,
            critical_messages: way.messages,
            critical_bytes: way.bytes,
            sent_messages: self.nodes.iter().map(|node| node.sent.messages).max().unwrap_or(0),
            sent_bytes: self.nodes.iter().map(|node| node.sent.bytes).max().unwrap_or(0),
            nanos: last.map_or(0, |node| node.now),
        }
    }
}

/// One rank's access to the air.
struct Port {
    rank: usize,
    size: usize,
    air: Arc<Mutex<Air>>,
}

impl Transport for Port {
    fn name(&self) -> &'static str {
        "simulation"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send(&mut self, peer: usize, tag: Tag, data: Memory) -> Result<Request> {
        let mut air = self.air.lock();
        // SAFETY: the bytes do not change until the request is done, which it is from the start.
        air.send(self.rank, peer, tag, unsafe { data.as_slice() }.to_vec());
        Ok(air.nodes[self.rank].requests.open_done())
    }

    fn recv(&mut self, peer: usize, tag: Tag, into: Memory) -> Result<Request> {
        let mut air = self.air.lock();
        let Node { matching, requests, .. } = &mut air.nodes[self.rank];
        let request = requests.open();
        if matching.post(peer, tag, Posted { request, into })? {
            requests.complete(request);
        }
        Ok(request)
    }

    fn try_recv_any(&mut self, peer: usize, tag: Tag) -> Result<Option<Vec<u8>>> {
        self.air.lock().nodes[self.rank].matching.take_any(peer, tag)
    }

    fn test(&mut self, request: Request) -> Result<bool> {
        self.air.lock().nodes[self.rank].requests.test(request)
    }

    fn ring(&mut self, _peer: usize) -> Result<()> {
        Ok(())
    }

    /// Time moves messages, not the ranks.
    fn progress(&mut self) -> Result<bool> {
        Ok(false)
    }

    fn abort(&mut self, _error: &Error) {}

    fn close(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn waiter(&self) -> Arc<dyn Waiter> {
        Arc::new(NoWaiter)
    }
}

/// Nobody sleeps in virtual time.
struct NoWaiter;

impl Waiter for NoWaiter {
    fn wait(&self, _timeout: Option<Duration>) {}

    fn wake(&self) {}
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::stall::Overdue;

    const AGE: Duration = Duration::from_secs(1);

    impl Simulation {
        /// Lets all messages arrive, and whoever has something to say say it.
        fn settle(&mut self) {
            let mut nobody = HashSet::new();
            for rank in 0..self.ranks.len() {
                self.poll(rank, &mut nobody).expect("a round");
            }
            while self.arrive() {}
        }

        /// Lets one message arrive; `false` if there is none.
        fn arrive(&mut self) -> bool {
            let arrived = self.air.lock().deliver_next().expect("a message");
            arrived.is_some_and(|rank| self.poll(rank, &mut HashSet::new()).is_ok())
        }

        fn overdue(&mut self, rank: usize, now: Instant) -> Vec<Overdue> {
            self.ranks[rank].overdue(now, AGE)
        }
    }

    proptest! {
        /// Whichever rank looks first, and however far a round of the others has come when the next one looks.
        #[test]
        fn a_tensor_agreed_on_before_is_told_overdue_with_the_rank_that_lacks_it(
            size in 2usize..6,
            (lacks, looks) in (any::<prop::sample::Index>(), prop::collection::vec((0usize..6, 0usize..8), 0..12)),
        ) {
            let lacks = lacks.index(size);
            let mut world = Simulation::new(size, 16, Network { latency_ns: 1, bandwidth: 1.0 });
            world.negotiate(&["known".to_string()]).expect("an agreement");
            let start = Instant::now();
            for rank in (0..size).filter(|&rank| rank != lacks) {
                world.ranks[rank].submit("known", signature(), Vec::new());
                world.overdue(rank, start);
            }
            let late = start + 2 * AGE;
            for (rank, arrivals) in looks {
                let rank = rank % size;
                world.overdue(rank, late).iter().for_each(|told| assert_eq!(told.missing, [lacks]));
                world.poll(rank, &mut HashSet::new()).expect("a round");
                for _ in 0..arrivals {
                    world.arrive();
                }
            }
            world.settle(); // the first look of each says in full what was a bit
            (0..size).for_each(|rank| drop(world.overdue(rank, late)));
            world.settle();
            for rank in (0..size).filter(|&rank| rank != lacks) {
                let told = world.overdue(rank, late);
                prop_assert_eq!(told.len(), 1, "rank {} of {} is told nothing", rank, size);
                prop_assert_eq!(&told[0].missing, &[lacks]);
                prop_assert_eq!(told[0].speaks, rank == usize::from(lacks == 0));
            }
        }
    }
}
