//! Properties of the collectives by which every rank gets something else (alltoall, reducescatter, send and receive), over
//! a transport and through shared memory, and of Adasum: any world size, length and type.

mod elements;
mod shm_support;
mod support;
mod turns;

use std::ops::Range;

use elements::*;
use hvd_core::collective::*;
use hvd_core::shm::{Part, ShmAllreduce, ShmAlltoall, ShmReducescatter};
use hvd_core::transport::Transport;
use hvd_core::transport::tcp::{Meeting, TcpOptions, TcpTransport};
use hvd_core::transport::thread::Delays;
use hvd_core::{DType, Error, Memory, ReduceOp};
use proptest::prelude::*;
use shm_support::in_group;
use support::{bytes, close, connect_all, fresh_job, identity, memory, on_each, watched};
use turns::{Operation, PATIENCE, TAG, delays, run_all, uneven, world};

/// Delays for about half of the cases.
fn maybe_delays() -> impl Strategy<Value = Option<Delays>> {
    proptest::option::of(any::<u64>()).prop_map(|seed| seed.and_then(delays))
}

/// What one rank has for another.
fn block(seed: u64, from: usize, to: usize, len: usize) -> Vec<u8> {
    random_elements(seed ^ (from * 1000 + to) as u64, ReduceOp::Sum, DType::U8, len)
}

/// Which blocks there are: the splits, and each rank's input and expected output.
#[derive(Clone, Debug)]
struct Blocks {
    rows: Vec<Vec<usize>>,
    seed: u64,
}

impl Blocks {
    fn splits(&self) -> Splits {
        Splits::new(&self.rows).unwrap()
    }

    fn input(&self, rank: usize) -> Vec<u8> {
        (0..self.rows.len()).flat_map(|to| block(self.seed, rank, to, self.rows[rank][to])).collect()
    }

    fn output(&self, rank: usize) -> Vec<u8> {
        (0..self.rows.len()).flat_map(|from| block(self.seed, from, rank, self.rows[from][rank])).collect()
    }

    fn run(&self, delays: Option<Delays>, make: impl Fn(usize, Memory, Memory) -> Operation) {
        let size = self.rows.len();
        let outputs: Vec<_> = (0..size).map(|rank| Memory::zeroed(self.output(rank).len())).collect();
        let operations = (0..size).map(|rank| make(rank, memory(&self.input(rank)), outputs[rank].clone()));
        run_all(world(size, delays), operations.collect());
        for (rank, output) in outputs.iter().enumerate() {
            assert!(bytes(output) == self.output(rank), "rank {rank} of {self:?}");
        }
    }
}

fn blocks(most: usize) -> impl Strategy<Value = Blocks> {
    let length = prop_oneof![Just(0), 1..20usize, 0..=most];
    let rows = (1..=9usize)
        .prop_flat_map(move |size| proptest::collection::vec(proptest::collection::vec(length.clone(), size), size));
    (rows, any::<u64>()).prop_map(|(rows, seed)| Blocks { rows, seed })
}

/// A reducescatter to try.
#[derive(Clone, Debug)]
struct Scatter {
    chunks: Vec<Range<usize>>,
    reduction: Reduction,
    seed: u64,
}

impl Scatter {
    fn inputs(&self) -> Vec<Vec<u8>> {
        let (size, Reduction { op, dtype, .. }) = (self.chunks.len(), self.reduction);
        let elements = self.chunks[size - 1].end;
        (0..size as u64).map(|rank| random_elements(self.seed ^ rank << 32, op, dtype, elements)).collect()
    }

    fn bytes_of(&self, rank: usize) -> Range<usize> {
        let (chunk, size) = (&self.chunks[rank], self.reduction.dtype.size());
        chunk.start * size..chunk.end * size
    }

    fn over_transport(&self, delays: Option<Delays>, segment_bytes: usize) -> Vec<Vec<u8>> {
        let size = self.chunks.len();
        let inputs: Vec<_> = self.inputs().iter().map(|input| memory(input)).collect();
        let outputs: Vec<_> = (0..size).map(|rank| Memory::zeroed(self.bytes_of(rank).len())).collect();
        let operation = |rank: usize| -> Operation {
            let (input, output, reduction) = (&inputs[rank], outputs[rank].clone(), self.reduction);
            Box::new(Reducescatter::new(rank, input, output, &self.chunks, reduction, TAG, segment_bytes).unwrap())
        };
        run_all(world(size, delays), (0..size).map(operation).collect());
        for (before, after) in self.inputs().iter().zip(&inputs) {
            assert!(before == bytes(after), "the input has changed");
        }
        outputs.iter().map(|output| bytes(output).to_vec()).collect()
    }

    /// Through shared memory, and each rank's chunk of an allreduce of the same.
    fn through_memory(&self, slot_bytes: usize) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let results = in_group(self.chunks.len(), slot_bytes, |member| {
            let (group, rank, dtype) = (member.group.clone(), member.transport.rank(), self.reduction.dtype);
            let input = memory(&self.inputs()[rank]);
            let (chunk, whole) = (Memory::zeroed(self.bytes_of(rank).len()), Memory::zeroed(input.len()));
            let (chunks, reduction) = (self.chunks.clone(), self.reduction);
            let part = Part { input: input.clone(), output: whole.clone(), elements: input.len() / dtype.size() };
            let scatter =
                ShmReducescatter::new(group.clone(), input, chunk.clone(), chunks, dtype, reduction, 1.0, 1.0);
            let allreduce = ShmAllreduce::new(group, vec![part], dtype, reduction, 1.0, 1.0);
            member.run(&mut [Box::new(scatter.unwrap()), Box::new(allreduce.unwrap())]);
            (bytes(&chunk).to_vec(), bytes(&whole)[self.bytes_of(rank)].to_vec())
        });
        results.into_iter().unzip()
    }

    fn check(&self, results: &[Vec<u8>]) {
        let Reduction { op, dtype, scale } = self.reduction;
        let mut expected = reference(op, dtype, &self.inputs(), scale);
        for (rank, result) in results.iter().enumerate().rev() {
            let own = expected.split_off(self.chunks[rank].start);
            assert_expected(dtype, result, &own, &format!("rank {rank} of {self:?}"));
        }
    }
}

fn scatters(most_elements: usize) -> impl Strategy<Value = Scatter> {
    let length = prop_oneof![0..40usize, 0..=most_elements];
    let scale = prop_oneof![Just(1.0), Just(0.5), Just(1.0 / 3.0)];
    (1..=9usize, length, proptest::sample::select(supported()), scale, any::<u64>(), any::<bool>()).prop_map(
        |(size, elements, (op, dtype), scale, seed, even)| {
            let scale = if dtype.is_float() { scale } else { 1.0 };
            let chunks = if even { even_chunks(elements, size) } else { uneven(elements, size, seed) };
            Scatter { chunks, reduction: Reduction { dtype, op, scale }, seed }
        },
    )
}

/// Some tensors to combine with Adasum.
#[derive(Clone, Debug)]
struct Tensors {
    size: usize,
    lengths: Vec<usize>,
    dtype: DType,
    segment_bytes: usize,
    seed: u64,
}

impl Tensors {
    /// Positive numbers, as Adasum jumps where vectors cancel out: next to nothing halves what it is added to, and nothing does not.
    fn tensor(&self, rank: usize, tensor: usize) -> Vec<u8> {
        let seed = self.seed ^ (rank as u64) << 32 ^ (tensor as u64) << 48;
        let mut elements = random_elements(seed, ReduceOp::Sum, self.dtype, self.lengths[tensor]);
        let sign = if cfg!(target_endian = "little") { self.dtype.size() - 1 } else { 0 };
        elements.chunks_mut(self.dtype.size()).for_each(|element| element[sign] &= 0x7f);
        elements
    }

    /// Where the parts of the tensors lie in the buffer: for each tensor, its parts' bytes there.
    fn places(&self) -> Vec<Vec<Range<usize>>> {
        let (chunks, bytes) = (AdasumAllreduce::chunks(self.size), self.dtype.size());
        let cuts: Vec<_> = self.lengths.iter().map(|&length| even_chunks(length, chunks)).collect();
        let mut places = vec![Vec::new(); cuts.len()];
        let mut at = 0;
        for chunk in 0..chunks {
            for (places, cut) in places.iter_mut().zip(&cuts) {
                places.push(at..at + cut[chunk].len() * bytes);
                at += cut[chunk].len() * bytes;
            }
        }
        places
    }

    /// What each rank has afterwards, tensor by tensor.
    fn run(&self, delays: Option<Delays>) -> Vec<Vec<Vec<u8>>> {
        let places = self.places();
        let buffers: Vec<_> = (0..self.size).map(|rank| memory(&self.packed(rank, &places))).collect();
        let operation = |(rank, buffer): (usize, &Memory)| -> Operation {
            let Tensors { size, lengths, dtype, segment_bytes, .. } = self;
            Box::new(AdasumAllreduce::new(rank, *size, buffer.clone(), lengths, *dtype, TAG, *segment_bytes))
        };
        run_all(world(self.size, delays), buffers.iter().enumerate().map(operation).collect());
        let tensor = |buffer: &Memory, parts: &[Range<usize>]| -> Vec<u8> {
            parts.iter().flat_map(|part| bytes(buffer)[part.clone()].to_vec()).collect()
        };
        buffers.iter().map(|buffer| places.iter().map(|parts| tensor(buffer, parts)).collect()).collect()
    }

    fn packed(&self, rank: usize, places: &[Vec<Range<usize>>]) -> Vec<u8> {
        let mut buffer = vec![0; self.lengths.iter().sum::<usize>() * self.dtype.size()];
        for (tensor, parts) in places.iter().enumerate() {
            let mut rest = self.tensor(rank, tensor).into_iter();
            parts.iter().for_each(|part| buffer[part.clone()].fill_with(|| rest.next().unwrap()));
        }
        buffer
    }

    fn check(&self, results: &[Vec<u8>]) {
        for (tensor, result) in results.iter().enumerate() {
            let inputs = (0..self.size).map(|rank| floats(self.dtype, &self.tensor(rank, tensor))).collect();
            let found = adasum::check(inputs, &floats(self.dtype, result), unit_roundoff(self.dtype));
            assert_eq!(found, Ok(()), "tensor {tensor} of {self:?}");
        }
    }
}

fn tensors(most: usize) -> impl Strategy<Value = Tensors> {
    let floats = DType::ALL.into_iter().filter(|dtype| dtype.is_float()).collect::<Vec<_>>();
    let lengths = proptest::collection::vec(prop_oneof![0..4usize, 0..=most], 1..5);
    (1..=9usize, lengths, proptest::sample::select(floats), prop_oneof![1..64usize, Just(4096)], any::<u64>())
        .prop_map(|(size, lengths, dtype, segment_bytes, seed)| Tensors { size, lengths, dtype, segment_bytes, seed })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn alltoall_brings_every_block(blocks in blocks(3000), segment_bytes in 1..2000usize, delays in maybe_delays()) {
        let splits = blocks.splits();
        blocks.run(delays, |rank, input, output| {
            Box::new(PairwiseAlltoall::new(rank, &splits, input, output, TAG, segment_bytes).unwrap())
        });
        blocks.run(delays, |rank, input, output| {
            Box::new(BruckAlltoall::new(rank, splits.clone(), input, output, TAG).unwrap())
        });
    }

    #[test]
    fn reducescatter_is_right(case in scatters(3000), segment_bytes in 1..5000usize, delays in maybe_delays()) {
        let results = case.over_transport(delays, segment_bytes);
        case.check(&results);
        prop_assert_eq!(results, case.over_transport(None, 1 << 20), "timing or segments have changed bits");
    }

    #[test]
    fn adasum_is_right_and_the_same_everywhere(case in tensors(700), delays in maybe_delays()) {
        let results = case.run(delays);
        case.check(&results[0]);
        prop_assert!(results.iter().all(|result| *result == results[0]), "ranks differ");
        prop_assert_eq!(&case.run(None)[0], &results[0], "timing has changed bits");
        for (tensor, together) in results[0].iter().enumerate() {
            let seed = case.seed ^ (tensor as u64) << 48;
            let alone = Tensors { lengths: vec![case.lengths[tensor]], seed, ..case.clone() };
            prop_assert_eq!(&alone.run(None)[0][0], together, "the tensors beside have changed bits");
        }
    }

    #[test]
    fn a_message_reaches_its_receiver(
        size in 2..=5usize, ends in any::<(prop::sample::Index, prop::sample::Index)>(), len in 0..9000usize,
        segment_bytes in 1..2000usize, delays in maybe_delays(), known in any::<bool>(),
    ) {
        let (from, gap) = (ends.0.index(size), 1 + ends.1.index(size - 1));
        let to = (from + gap) % size;
        let message = block(7, from, to, len);
        let (landed, slot) = std::sync::mpsc::channel();
        let place = Memory::zeroed(len);
        let landing = match known {
            true => Landing::Into(place.clone()),
            false => Landing::Allocate(Box::new(move |bytes| {
                let memory = Memory::zeroed(bytes);
                landed.send(memory.clone()).unwrap();
                memory
            })),
        };
        let mut world = world(size, delays);
        let send = SendTo::new("x", from, to, memory(&message), DType::U8, TAG, segment_bytes).unwrap();
        let receive = ReceiveFrom::new("x", to, from, landing, DType::U8, TAG, segment_bytes).unwrap();
        let ends = run_pair(&mut world, [(from, Box::new(send)), (to, Box::new(receive))]);
        prop_assert!(ends.iter().all(Result::is_ok));
        let place = if known { place } else { slot.recv().unwrap() };
        prop_assert_eq!(bytes(&place), message);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn alltoall_through_memory_brings_every_block(blocks in blocks(6000), large in any::<bool>()) {
        watched(move || {
            let splits = blocks.splits();
            in_group(blocks.rows.len(), if large { 64 << 10 } else { 128 }, |member| {
                let rank = member.transport.rank();
                let output = Memory::zeroed(blocks.output(rank).len());
                let input = memory(&blocks.input(rank));
                let alltoall = ShmAlltoall::new(member.group.clone(), &splits, input, output.clone()).unwrap();
                member.run(&mut [Box::new(alltoall)]);
                assert!(bytes(&output) == blocks.output(rank), "rank {rank} of {blocks:?}");
            });
        });
    }

    #[test]
    fn reducescatter_has_the_same_bits_everywhere(case in scatters(5000), large in any::<bool>()) {
        watched(move || {
            let (scattered, reduced) = case.through_memory(if large { 64 << 10 } else { 128 });
            case.check(&scattered);
            assert!(scattered == reduced, "{case:?}: an allreduce has other bits");
            assert!(scattered == case.over_transport(None, 4096), "{case:?}: a transport has other bits");
        });
    }
}

/// Runs two operations on two of the ranks to their ends.
fn run_pair(world: &mut [impl Transport], operations: [(usize, Operation); 2]) -> [hvd_core::Result<()>; 2] {
    let mut ends = operations.map(|(rank, operation)| (rank, operation, None));
    for _ in 0..PATIENCE {
        for transport in world.iter_mut() {
            transport.progress().unwrap();
        }
        for (rank, operation, end) in ends.iter_mut().filter(|(_, _, end)| end.is_none()) {
            *end = operation.poll(&mut world[*rank]).map(|done| done.then_some(())).transpose();
        }
        if ends.iter().all(|(_, _, end)| end.is_some()) {
            return ends.map(|(_, _, end)| end.unwrap());
        }
    }
    panic!("a message is never delivered");
}

#[test]
fn both_ends_hear_that_a_message_does_not_fit() {
    let zeroed = |len| Landing::Into(Memory::zeroed(len));
    let send = |rank: usize, len| -> Operation {
        Box::new(SendTo::new("x", rank, 1 - rank, Memory::zeroed(len), DType::F32, TAG, 64).unwrap())
    };
    let receive = |rank: usize, landing, dtype| -> Operation {
        Box::new(ReceiveFrom::new("x", rank, 1 - rank, landing, dtype, TAG, 64).unwrap())
    };
    let mut world = world(2, None);
    for (one, two, said) in [
        (send(0, 12), receive(1, zeroed(8), DType::F32), ["rank 0 sends 3 f32", "rank 1 receives 2 f32"]),
        (send(0, 12), receive(1, zeroed(12), DType::I32), ["rank 0 sends 3 f32", "rank 1 receives 3 i32"]),
        (send(0, 4), send(1, 4), ["rank 0 sends 1 f32", "rank 1 sends 1 f32"]),
        (
            receive(0, Landing::Allocate(Box::new(Memory::zeroed)), DType::U8),
            receive(1, zeroed(1), DType::U8),
            ["rank 0 receives any number of u8", "rank 1 receives 1 u8"],
        ),
    ] {
        for end in run_pair(&mut world, [(0, one), (1, two)]) {
            let Err(error @ Error::Mismatch { .. }) = end else { panic!("{end:?}") };
            assert!(said.iter().all(|said| error.to_string().contains(said)), "{error}");
        }
    }
    // The ranks go on.
    let ends = run_pair(&mut world, [(0, send(0, 12)), (1, receive(1, zeroed(12), DType::F32))]);
    assert!(ends.iter().all(Result::is_ok));
    assert!(matches!(
        SendTo::new("x", 1, 1, Memory::empty(), DType::U8, TAG, 64),
        Err(Error::Invalid(text)) if text.contains("rank 1")
    ));
}

#[test]
fn descriptions_that_do_not_fit_are_refused() {
    let reduction = Reduction::new(DType::F32, ReduceOp::Sum);
    let scatter = |bytes, chunks: &[Range<usize>]| {
        Reducescatter::new(0, &Memory::zeroed(40), Memory::zeroed(bytes), chunks, reduction, TAG, 64).is_ok()
    };
    assert!(scatter(20, &[0..5, 5..10]));
    assert!(!scatter(16, &[0..5, 5..10]));
    assert!(!scatter(20, &[0..5, 5..11]));
    assert!(!scatter(20, &[]));
    in_group(1, 64, |member| {
        let scatter = |elements, bytes, user| {
            let (input, output, group) = (Memory::zeroed(40), Memory::zeroed(bytes), member.group.clone());
            let chunks = even_chunks(elements, 1);
            ShmReducescatter::new(group, input, output, chunks, user, reduction, 1.0, 1.0).is_ok()
        };
        assert!(!scatter(10, 36, DType::F32));
        assert!(!scatter(11, 44, DType::F32));
        assert!(!scatter(10, 40, DType::I32));
        let splits = Splits::new(&[vec![3]]).unwrap();
        assert!(ShmAlltoall::new(member.group.clone(), &splits, Memory::zeroed(3), Memory::zeroed(4)).is_err());
    });
}

/// Blocks that fill the sockets' buffers both ways.
#[test]
fn large_blocks_over_tcp() {
    watched(|| {
        let blocks = Blocks { rows: vec![vec![5, 3_000_001], vec![2_100_000, 9]], seed: 3 };
        let meeting = Meeting::Unix { job: fresh_job() };
        let ranks =
            connect_all(2, |rank| TcpTransport::connect(identity(rank, 2), &meeting, &TcpOptions::default()).unwrap());
        on_each(ranks, |mut transport| {
            let (rank, splits) = (transport.rank(), blocks.splits());
            let (input, output) = (memory(&blocks.input(rank)), Memory::zeroed(blocks.output(rank).len()));
            let alltoall = PairwiseAlltoall::new(rank, &splits, input, output.clone(), TAG, 256 << 10);
            run(&mut alltoall.unwrap(), &mut *transport).unwrap();
            assert!(bytes(&output) == blocks.output(rank), "rank {rank}");
            close(transport);
        });
    });
}
