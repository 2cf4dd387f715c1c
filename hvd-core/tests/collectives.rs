//! Properties of the collectives on worlds of threads: any world size, length, type and operation.
//!
//! Most run all ranks on the test's own thread, in turns: that is fast at any size and finds every wait that never ends
//! (too many turns without an end) without a clock.

mod elements;
mod support;
mod turns;

use std::ops::Range;

use elements::*;
use hvd_core::collective::*;
use hvd_core::transport::thread::{Delays, ThreadTransport};
use hvd_core::transport::{Tag, Transport};
use hvd_core::{DType, Memory, ReduceOp};
use proptest::prelude::*;
use support::{bytes, close, memory, on_each, watched};
use turns::{Operation, PATIENCE, TAG, delays, run_all, uneven, world};

/// An allreduce to try.
#[derive(Clone, Debug)]
struct Case {
    size: usize,
    elements: usize,
    op: ReduceOp,
    dtype: DType,
    scale: f64,
    segment_bytes: usize,
    seed: u64,
}

impl Case {
    fn inputs(&self) -> Vec<Vec<u8>> {
        let seed = |rank: usize| self.seed ^ (rank as u64) << 32;
        (0..self.size).map(|rank| random_elements(seed(rank), self.op, self.dtype, self.elements)).collect()
    }

    fn reduction(&self) -> Reduction {
        Reduction { dtype: self.dtype, op: self.op, scale: self.scale }
    }

    fn ring(&self, rank: usize, buffer: Memory, chunks: Vec<Range<usize>>) -> Operation {
        Box::new(RingAllreduce::new(rank, self.size, buffer, chunks, self.reduction(), TAG, self.segment_bytes))
    }

    fn doubling(&self, rank: usize, buffer: Memory) -> Operation {
        Box::new(DoublingAllreduce::new(rank, self.size, buffer, self.reduction(), TAG))
    }

    /// Runs an operation made for each rank and its buffer; gives the buffers afterwards.
    fn run(&self, delays: Option<Delays>, make: impl Fn(usize, Memory) -> Operation) -> Vec<Vec<u8>> {
        let buffers: Vec<_> = self.inputs().iter().map(|input| memory(input)).collect();
        let operations = buffers.iter().enumerate().map(|(rank, buffer)| make(rank, buffer.clone())).collect();
        run_all(world(self.size, delays), operations);
        buffers.iter().map(|buffer| bytes(buffer).to_vec()).collect()
    }

    fn even(&self) -> Vec<Range<usize>> {
        even_chunks(self.elements, self.size)
    }

    /// Right, and the same bytes on every rank.
    fn check(&self, results: &[Vec<u8>]) {
        let expected = reference(self.op, self.dtype, &self.inputs(), self.scale);
        assert_expected(self.dtype, &results[0], &expected, &format!("{self:?}"));
        for (rank, result) in results.iter().enumerate() {
            assert_eq!(result, &results[0], "{self:?}: ranks {rank} and 0 differ");
        }
    }
}

fn cases(most_elements: usize) -> impl Strategy<Value = Case> {
    let length = prop_oneof![0..40usize, 0..=most_elements];
    let segment = prop_oneof![1..64usize, 64..4096usize, Just(1 << 20)];
    let scale = prop_oneof![Just(1.0), Just(0.5), Just(1.0 / 3.0)];
    let what = proptest::sample::select(supported());
    (1..=17usize, length, what, scale, segment, any::<u64>()).prop_map(
        |(size, elements, (op, dtype), scale, segment_bytes, seed)| {
            let scale = if dtype.is_float() { scale } else { 1.0 };
            Case { size, elements, op, dtype, scale, segment_bytes, seed }
        },
    )
}

/// Tensors of other memory than the buffer's: every byte must be asked for once.
struct Elsewhere {
    buffer: Memory,
    source: Vec<u8>,
    /// Results, and how often each byte has been filled and drained.
    sink: Memory,
    counts: Vec<[u8; 2]>,
}

impl Elsewhere {
    fn count(&mut self, bytes: &Range<usize>, which: usize) {
        self.counts[bytes.clone()].iter_mut().for_each(|count| count[which] += 1);
    }
}

impl Feed for Elsewhere {
    fn fill(&mut self, bytes: Range<usize>) {
        self.count(&bytes, 0);
        let into = self.buffer.slice(bytes.clone());
        // SAFETY: the ring asks for bytes that are not in use.
        unsafe { into.as_mut_slice() }.copy_from_slice(&self.source[bytes]);
    }

    fn drain(&mut self, bytes: Range<usize>) {
        self.count(&bytes, 1);
        let (into, from) = (self.sink.slice(bytes.clone()), self.buffer.slice(bytes));
        // SAFETY: as above, and the sink is this feed's.
        unsafe { into.as_mut_slice().copy_from_slice(from.as_slice()) };
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.counts.iter().all(|counts| *counts == [1, 1]), "{:?}", self.counts);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn ring_allreduce_is_right(case in cases(5000)) {
        case.check(&case.run(None, |rank, buffer| case.ring(rank, buffer, case.even())));
    }

    #[test]
    fn ring_allreduce_takes_any_chunks(case in cases(500), cuts in any::<u64>()) {
        let chunks = uneven(case.elements, case.size, cuts);
        case.check(&case.run(None, |rank, buffer| case.ring(rank, buffer, chunks.clone())));
    }

    #[test]
    fn a_ring_may_be_fed_piece_by_piece(case in cases(5000), cuts in any::<u64>(), slow in any::<u64>()) {
        let chunks = uneven(case.elements, case.size, cuts);
        let inputs = case.inputs();
        let sinks: Vec<_> = inputs.iter().map(|input| memory(&vec![0xAB; input.len()])).collect();
        case.run(delays(slow), |rank, buffer| {
            // SAFETY: the operation has not begun.
            unsafe { buffer.as_mut_slice() }.fill(0);
            let counts = vec![[0, 0]; buffer.len()];
            let feed = Elsewhere { buffer: buffer.clone(), source: inputs[rank].clone(), sink: sinks[rank].clone(), counts };
            let (size, reduction) = (case.size, case.reduction());
            let ring = RingAllreduce::new(rank, size, buffer, chunks.clone(), reduction, TAG, case.segment_bytes);
            Box::new(ring.fed_by(Some(Box::new(feed))))
        });
        let whole = case.run(None, |rank, buffer| case.ring(rank, buffer, chunks.clone()));
        let got: Vec<_> = sinks.iter().map(|sink| bytes(sink).to_vec()).collect();
        prop_assert_eq!(got, whole);
    }

    #[test]
    fn doubling_allreduce_is_right(case in cases(600)) {
        case.check(&case.run(None, |rank, buffer| case.doubling(rank, buffer)));
    }

    #[test]
    fn timing_changes_no_bit(case in cases(700), seed in any::<u64>()) {
        let ring = |rank: usize, buffer: Memory| case.ring(rank, buffer, case.even());
        let doubling = |rank: usize, buffer: Memory| case.doubling(rank, buffer);
        prop_assert_eq!(case.run(delays(seed), ring), case.run(None, ring));
        prop_assert_eq!(case.run(delays(seed), doubling), case.run(None, doubling));
    }

    #[test]
    fn segments_change_no_bit(case in cases(700), segment_bytes in 1..5000usize) {
        let other = Case { segment_bytes, ..case.clone() };
        let run = |case: &Case| case.run(None, |rank, buffer| case.ring(rank, buffer, case.even()));
        prop_assert_eq!(run(&case), run(&other));
    }

    #[test]
    fn the_halves_make_the_whole(case in cases(700), cuts in any::<u64>()) {
        let chunks = uneven(case.elements, case.size, cuts);
        let scattered = case.run(None, |rank, buffer| {
            let (chunks, reduction) = (chunks.clone(), case.reduction());
            Box::new(RingReduceScatter::new(rank, case.size, buffer, chunks, reduction, TAG, case.segment_bytes))
        });
        let whole = case.run(None, |rank, buffer| case.ring(rank, buffer, chunks.clone()));
        let bytes_of = |chunk: &Range<usize>| chunk.start * case.dtype.size()..chunk.end * case.dtype.size();
        for (rank, chunk) in chunks.iter().enumerate() {
            prop_assert_eq!(&scattered[rank][bytes_of(chunk)], &whole[rank][bytes_of(chunk)]);
        }
    }

    #[test]
    fn allgather_brings_every_part(
        size in 1..=17usize, len in 0..3000usize, segment_bytes in 1..700usize, seed in any::<u64>(), slow in any::<bool>(),
    ) {
        let ranges = uneven(len, size, seed);
        let whole = random_elements(seed, ReduceOp::Sum, DType::U8, len);
        let outputs: Vec<_> = ranges.iter().map(|own| {
            let mut output = vec![0; len];
            output[own.clone()].copy_from_slice(&whole[own.clone()]);
            memory(&output)
        }).collect();
        let operations = outputs.iter().enumerate().map(|(rank, output)| -> Operation {
            Box::new(Allgather::new(rank, size, output.clone(), ranges.clone(), TAG, segment_bytes))
        }).collect();
        run_all(world(size, slow.then_some(seed).and_then(delays)), operations);
        for output in &outputs {
            prop_assert_eq!(bytes(output), &whole);
        }
    }

    #[test]
    fn broadcast_reaches_all(
        size in 1..=17usize, root in any::<prop::sample::Index>(), len in 0..5000usize, segment_bytes in 1..2000usize,
        seed in any::<u64>(), slow in any::<bool>(),
    ) {
        let root = root.index(size);
        let payload = random_elements(seed, ReduceOp::Sum, DType::U8, len);
        let buffers: Vec<_> =
            (0..size).map(|rank| if rank == root { memory(&payload) } else { Memory::zeroed(len) }).collect();
        let operations = buffers.iter().enumerate().map(|(rank, buffer)| -> Operation {
            Box::new(Broadcast::new(rank, size, root, buffer.clone(), TAG, segment_bytes))
        }).collect();
        run_all(world(size, slow.then_some(seed).and_then(delays)), operations);
        for buffer in &buffers {
            prop_assert_eq!(bytes(buffer), &payload);
        }
    }

    #[test]
    fn a_barrier_waits_for_the_last(size in 1..=17usize, last in any::<prop::sample::Index>(), seed in any::<u64>()) {
        let last = last.index(size);
        let mut world = world(size, delays(seed));
        let mut barriers: Vec<_> = (0..size).map(|rank| Barrier::new(rank, size, TAG)).collect();
        for _ in 0..200 {
            for rank in (0..size).filter(|rank| *rank != last) {
                world[rank].progress().unwrap();
                prop_assert!(!barriers[rank].poll(&mut world[rank]).unwrap(), "rank {} did not wait", rank);
            }
        }
        run_all(world, barriers.into_iter().map(|barrier| -> Operation { Box::new(barrier) }).collect());
    }
}

/// Several megabytes in the default way, ranks as threads, with [`run`], several operations in a row on one transport.
#[test]
fn big_buffers_on_threads() {
    watched(|| {
        for (size, op, dtype) in
            [(2, ReduceOp::Sum, DType::F32), (3, ReduceOp::Average, DType::BF16), (8, ReduceOp::Max, DType::I64)]
        {
            let case = Case { size, elements: 1_000_003, op, dtype, scale: 1.0, segment_bytes: 256 << 10, seed: 5 };
            let inputs = case.inputs();
            let ranks = ThreadTransport::world(size).into_iter().map(|rank| Box::new(rank) as support::Rank).collect();
            let results = on_each(ranks, |mut transport| {
                let rank = transport.rank();
                let buffer = memory(&inputs[rank]);
                run(&mut *case.ring(rank, buffer.clone(), case.even()), &mut *transport).unwrap();
                run(&mut Barrier::new(rank, size, Tag { channel: 3, sequence: 0 }), &mut *transport).unwrap();
                let copy = if rank == 1 { buffer.clone() } else { Memory::zeroed(buffer.len()) };
                let tag = Tag { channel: 3, sequence: 1 };
                run(&mut Broadcast::new(rank, size, 1, copy.clone(), tag, 256 << 10), &mut *transport).unwrap();
                close(transport);
                assert!(bytes(&copy) == bytes(&buffer), "the broadcast differs from the result");
                bytes(&buffer).to_vec()
            });
            case.check(&results);
        }
    });
}

/// Zeros of either sign are equal, and the first of equals wins: which one that is, is the same on all ranks.
#[test]
fn doubling_combines_in_the_same_order_on_all_ranks() {
    for size in 2..=17 {
        for op in [ReduceOp::Min, ReduceOp::Max] {
            let zeros = |rank: usize| (0..32).map(move |bit| if rank >> (bit % 5) & 1 == 0 { 0.0f32 } else { -0.0 });
            let buffers: Vec<_> = (0..size).map(|rank| Memory::from_vec(zeros(rank).collect::<Vec<_>>())).collect();
            let make = |(rank, buffer): (usize, &Memory)| -> Operation {
                let reduction = Reduction::new(DType::F32, op);
                Box::new(DoublingAllreduce::new(rank, size, buffer.clone(), reduction, TAG))
            };
            run_all(world(size, None), buffers.iter().enumerate().map(make).collect());
            assert!(buffers.iter().all(|buffer| bytes(buffer) == bytes(&buffers[0])), "{op:?} on {size} ranks");
        }
    }
}

/// Two operations of different tags at once do not disturb each other.
#[test]
fn operations_in_flight_together() {
    let case =
        Case { size: 5, elements: 3001, op: ReduceOp::Sum, dtype: DType::F32, scale: 1.0, segment_bytes: 512, seed: 9 };
    let run_both = |delays: Option<Delays>| {
        let buffers: Vec<_> = case.inputs().iter().map(|input| (memory(input), memory(input))).collect();
        let mut world = world(case.size, delays);
        let mut pending: Vec<(usize, Operation)> = Vec::new();
        for (rank, (one, two)) in buffers.iter().enumerate() {
            let tag = Tag { channel: 4, sequence: 0 };
            pending.push((rank, case.ring(rank, one.clone(), case.even())));
            pending.push((rank, Box::new(DoublingAllreduce::new(rank, case.size, two.clone(), case.reduction(), tag))));
        }
        for _ in 0..PATIENCE {
            world.iter_mut().for_each(|transport| {
                transport.progress().unwrap();
            });
            pending.retain_mut(|(rank, operation)| !operation.poll(&mut world[*rank]).unwrap());
            if pending.is_empty() {
                return buffers.iter().map(|(one, two)| (bytes(one).to_vec(), bytes(two).to_vec())).unzip();
            }
        }
        panic!("the operations wait for ever");
    };
    let (ring, doubling): (Vec<_>, Vec<_>) = run_both(delays(1));
    case.check(&ring);
    case.check(&doubling);
    assert_eq!(run_both(None), (ring, doubling));
}
