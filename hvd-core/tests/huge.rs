//! Operations on more than 2³¹ elements. Each needs up to 9 GiB, so they are ignored unless asked for:
//! `cargo test -p hvd-core --test huge -- --ignored --test-threads 1`

mod shm_support;
mod support;

use hvd_core::collective::*;
use hvd_core::config::Config;
use hvd_core::shm::*;
use hvd_core::transport::Tag;
use hvd_core::transport::thread::ThreadTransport;
use hvd_core::{DType, Memory, ReduceOp, World};
use shm_support::{Member, in_group};
use support::{bytes, close, on_each};

/// No multiple of anything.
const ELEMENTS: usize = (1 << 31) + 5;

const SEGMENT_BYTES: usize = 1 << 20;
const TAG: Tag = Tag { channel: 1, sequence: 1 };
const SUM: Reduction = Reduction::new(DType::U8, ReduceOp::Sum);

/// The contents repeat after a prime number of elements: no offset that is wrong by a power of two goes unnoticed.
const PERIOD: usize = 1_000_003;

/// Elements that repeat.
struct Pattern(Vec<u8>);

impl Pattern {
    /// What a rank has.
    fn of(rank: usize) -> Self {
        Pattern((0..PERIOD).map(|at| (at ^ at >> 7 ^ at >> 14 ^ rank << 6) as u8).collect())
    }

    /// The sum of both ranks'.
    fn sum() -> Self {
        Pattern(Pattern::of(0).0.iter().zip(Pattern::of(1).0).map(|(one, two)| one.wrapping_add(two)).collect())
    }

    fn repeated(&self, len: usize) -> Vec<u8> {
        let mut all = self.0.repeat(len.div_ceil(PERIOD));
        all.truncate(len);
        all
    }

    fn memory(&self, len: usize) -> Memory {
        Memory::from_vec(self.repeated(len))
    }

    /// Looks at every element; the first is the pattern's at `start`.
    fn check(&self, mut got: &[u8], mut start: usize) {
        while !got.is_empty() {
            let rest = &self.0[start % PERIOD..];
            let (now, later) = got.split_at(rest.len().min(got.len()));
            assert!(now == &rest[..now.len()], "wrong from about element {start} on");
            (got, start) = (later, start + now.len());
        }
    }
}

fn input(rank: usize) -> Memory {
    Pattern::of(rank).memory(ELEMENTS)
}

fn boxed(operation: impl Collective + 'static, memory: Memory) -> (Box<dyn Collective>, Memory) {
    (Box::new(operation), memory)
}

/// Runs `make` on two ranks over a transport.
fn over_transport(make: impl Fn(usize) -> (Box<dyn Collective>, Memory) + Sync, check: impl Fn(usize, &Memory) + Sync) {
    let ranks = ThreadTransport::world(2).into_iter().map(|rank| Box::new(rank) as support::Rank).collect();
    on_each(ranks, |mut transport| {
        let rank = transport.rank();
        let (mut operation, memory) = make(rank);
        run(&mut *operation, &mut *transport).unwrap();
        drop(operation);
        check(rank, &memory);
        close(transport);
    });
}

/// Where the blocks of two ranks are cut: unevenly.
fn splits() -> Splits {
    Splits::new(&[vec![7, ELEMENTS - 7], vec![ELEMENTS - 11, 11]]).unwrap()
}

fn check_alltoall(rank: usize, output: &Memory) {
    for (from, block) in splits().received(rank).into_iter().enumerate() {
        Pattern::of(from).check(&bytes(output)[block], splits().sent(from)[rank].start);
    }
}

#[test]
#[ignore = "needs 5 GiB"]
fn allreduce_over_a_transport() {
    let ring = |rank| {
        let (buffer, chunks) = (input(rank), even_chunks(ELEMENTS, 2));
        boxed(RingAllreduce::new(rank, 2, buffer.clone(), chunks, SUM, TAG, SEGMENT_BYTES), buffer)
    };
    over_transport(ring, |_, memory| Pattern::sum().check(bytes(memory), 0));
}

#[test]
#[ignore = "needs 5 GiB"]
fn broadcast_and_allgather_over_a_transport() {
    let broadcast = |rank| {
        let buffer = if rank == 1 { input(1) } else { Memory::zeroed(ELEMENTS) };
        boxed(Broadcast::new(rank, 2, 1, buffer.clone(), TAG, SEGMENT_BYTES), buffer)
    };
    over_transport(broadcast, |_, memory| Pattern::of(1).check(bytes(memory), 0));
    let cut = ELEMENTS - 3;
    let gather = |rank| {
        let output = input(rank);
        boxed(Allgather::new(rank, 2, output.clone(), vec![0..cut, cut..ELEMENTS], TAG, SEGMENT_BYTES), output)
    };
    over_transport(gather, |_, memory| {
        Pattern::of(0).check(&bytes(memory)[..cut], 0);
        Pattern::of(1).check(&bytes(memory)[cut..], cut);
    });
}

#[test]
#[ignore = "needs 9 GiB"]
fn alltoall_and_reducescatter_over_a_transport() {
    let alltoall = |rank| {
        let output = Memory::zeroed(splits().received(rank)[1].end);
        let operation = PairwiseAlltoall::new(rank, &splits(), input(rank), output.clone(), TAG, SEGMENT_BYTES);
        boxed(operation.unwrap(), output)
    };
    over_transport(alltoall, check_alltoall);
    let chunks = [0..5, 5..ELEMENTS];
    let scatter = |rank: usize| {
        let output = Memory::zeroed(chunks[rank].len());
        let operation = Reducescatter::new(rank, &input(rank), output.clone(), &chunks, SUM, TAG, SEGMENT_BYTES);
        boxed(operation.unwrap(), output)
    };
    over_transport(scatter, |rank, memory| {
        assert_eq!(memory.len(), chunks[rank].len());
        Pattern::sum().check(bytes(memory), chunks[rank].start);
    });
}

#[test]
#[ignore = "needs 5 GiB"]
fn a_message() {
    let message = |rank| match rank {
        0 => {
            let memory = input(0);
            let send = SendTo::new("huge", 0, 1, memory.clone(), DType::U8, TAG, SEGMENT_BYTES);
            boxed(send.unwrap(), memory)
        }
        _ => {
            let memory = Memory::zeroed(ELEMENTS);
            let landing = Landing::Into(memory.clone());
            let receive = ReceiveFrom::new("huge", 1, 0, landing, DType::U8, TAG, SEGMENT_BYTES);
            boxed(receive.unwrap(), memory)
        }
    };
    over_transport(message, |_, memory| Pattern::of(0).check(bytes(memory), 0));
}

#[test]
#[ignore = "needs 7 GiB"]
fn named_operations() {
    let run = |world: World| {
        let mut data = Pattern::of(world.rank()).repeated(ELEMENTS);
        world.allreduce("huge", &mut data, ReduceOp::Sum).unwrap();
        Pattern::sum().check(&data, 0);
        world.shutdown().unwrap();
    };
    World::threads_sharing(2, &Config::default(), run);
    World::threads(2, run);
}

#[test]
#[ignore = "needs 9 GiB"]
fn through_memory() {
    in_group(2, 128 << 10, |member| {
        allreduce_through_memory(member);
        broadcast_and_allgather_through_memory(member);
        alltoall_and_reducescatter_through_memory(member);
    });
}

fn allreduce_through_memory(member: &mut Member) {
    let memory = input(member.group.rank());
    let part = Part { input: memory.clone(), output: memory.clone(), elements: ELEMENTS };
    let reduce = ShmAllreduce::new(member.group.clone(), vec![part], DType::U8, SUM, 1.0, 1.0).unwrap();
    member.run(&mut [Box::new(reduce)]);
    Pattern::sum().check(bytes(&memory), 0);
}

fn broadcast_and_allgather_through_memory(member: &mut Member) {
    let (group, rank) = (member.group.clone(), member.group.rank());
    let (memory, cut) = (input(rank), ELEMENTS - 3);
    let own = if rank == 0 { 0..cut } else { cut..ELEMENTS };
    let gather = ShmAllgather::new(group.clone(), memory.slice(own), memory.clone(), &[cut, 3]).unwrap();
    member.run(&mut [Box::new(gather)]);
    Pattern::of(0).check(&bytes(&memory)[..cut], 0);
    Pattern::of(1).check(&bytes(&memory)[cut..], cut);

    // The ranks hold the same now; rank 0 alone is given something else to send.
    if rank == 0 {
        // SAFETY: no operation uses the memory.
        unsafe { memory.as_mut_slice() }.fill(77);
    }
    member.run(&mut [Box::new(ShmBroadcast::new(group, memory.clone(), 0).unwrap())]);
    assert!(bytes(&memory).chunks(PERIOD).all(|chunk| chunk == &[77; PERIOD][..chunk.len()]), "a wrong broadcast");
}

fn alltoall_and_reducescatter_through_memory(member: &mut Member) {
    let (group, rank) = (member.group.clone(), member.group.rank());
    let (memory, output) = (input(rank), Memory::zeroed(splits().received(rank)[1].end));
    let alltoall = ShmAlltoall::new(group.clone(), &splits(), memory.clone(), output.clone()).unwrap();
    member.run(&mut [Box::new(alltoall)]);
    check_alltoall(rank, &output);
    drop(output);

    let chunks = vec![0..5, 5..ELEMENTS];
    let (start, output) = (chunks[rank].start, Memory::zeroed(chunks[rank].len()));
    let scatter = ShmReducescatter::new(group, memory, output.clone(), chunks, DType::U8, SUM, 1.0, 1.0).unwrap();
    member.run(&mut [Box::new(scatter)]);
    Pattern::sum().check(bytes(&output), start);
}
