//! Shared-memory collectives on ranks that are threads: results, bits, order, sleeping, and what can go wrong.

mod shm_support;
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::{bf16, f16};
use hvd_core::collective::{Collective, Reduction};
use hvd_core::shm::{Part, ShmAllgather, ShmAllreduce, ShmBarrier, ShmBroadcast, ShmGroup};
use hvd_core::transport::thread::ThreadTransport;
use hvd_core::{Compression, DType, Error, Memory, ReduceOp};
use proptest::prelude::*;
use shm_support::{Member, form, in_group};
use support::skipped::skipped;
use support::watched;

const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max, ReduceOp::Product];

fn encode(dtype: DType, values: &[f64]) -> Memory {
    let bytes = values.iter().flat_map(|&value| match dtype {
        DType::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        DType::F32 => (value as f32).to_le_bytes().to_vec(),
        DType::F64 => value.to_le_bytes().to_vec(),
        DType::I32 => (value as i32).to_le_bytes().to_vec(),
        DType::I64 => (value as i64).to_le_bytes().to_vec(),
        DType::I16 => (value as i16).to_le_bytes().to_vec(),
        DType::I8 => (value as i8).to_le_bytes().to_vec(),
        DType::U8 | DType::Bool => vec![value as u8],
    });
    Memory::from_vec(bytes.collect::<Vec<u8>>())
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let of = |element: &[u8]| match dtype {
        DType::F16 => f16::from_le_bytes([element[0], element[1]]).to_f64(),
        DType::BF16 => bf16::from_le_bytes([element[0], element[1]]).to_f64(),
        DType::F32 => f32::from_le_bytes(element.try_into().unwrap()).into(),
        DType::F64 => f64::from_le_bytes(element.try_into().unwrap()),
        DType::I32 => i32::from_le_bytes(element.try_into().unwrap()).into(),
        DType::I64 => i64::from_le_bytes(element.try_into().unwrap()) as f64,
        DType::I16 => i16::from_le_bytes(element.try_into().unwrap()).into(),
        DType::I8 => (element[0] as i8).into(),
        DType::U8 | DType::Bool => element[0].into(),
    };
    bytes.chunks(dtype.size()).map(of).collect()
}

fn bytes(memory: &Memory) -> Vec<u8> {
    // SAFETY: the tests look only at memory whose operations are complete.
    unsafe { memory.as_slice().to_vec() }
}

/// A number that depends on everything and is easy to repeat.
fn hash(rank: usize, part: usize, element: usize) -> u64 {
    let mut x = (rank as u64 + 1) ^ ((part as u64) << 20) ^ ((element as u64) << 32);
    for _ in 0..3 {
        x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    x ^ (x >> 32)
}

/// A value whose sums and products over nine ranks every dtype holds exactly.
fn exact(dtype: DType, rank: usize, part: usize, element: usize) -> f64 {
    let pick = (hash(rank, part, element) % 4) as usize;
    match dtype {
        DType::U8 => [0.0, 1.0, 2.0, 3.0][pick],
        DType::Bool => [0.0, 1.0, 0.0, 1.0][pick],
        _ => [-2.0, -1.0, 1.0, 2.0][pick],
    }
}

fn expected(op: ReduceOp, dtype: DType, values: &[f64]) -> f64 {
    match op {
        ReduceOp::Sum => values.iter().sum(),
        ReduceOp::Average if dtype.is_float() => values.iter().sum::<f64>() / values.len() as f64,
        ReduceOp::Average => (values.iter().sum::<f64>() / values.len() as f64).floor(),
        ReduceOp::Min => values.iter().copied().fold(f64::INFINITY, f64::min),
        ReduceOp::Max => values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        ReduceOp::Product => values.iter().product(),
        ReduceOp::Adasum => unreachable!("not in shared memory"),
    }
}

#[derive(Clone, Debug)]
struct Case {
    ranks: usize,
    parts: Vec<usize>,
    dtype: DType,
    op: ReduceOp,
    compression: Compression,
    slot_bytes: usize,
    in_place: bool,
    factors: (f64, f64, f64),
}

fn cases() -> impl Strategy<Value = Case> {
    let dtype_and_op = (prop::sample::select(&DType::ALL[..]), prop::sample::select(&OPS[..]))
        .prop_filter("defined", |(dtype, op)| op.supports(*dtype));
    let compressions = [Compression::None, Compression::Fp16, Compression::Bf16];
    let factor = || prop::sample::select(vec![1.0, 1.0, 0.5, 2.0]);
    (
        1..=9usize,
        prop::collection::vec(prop_oneof![0..40usize, 0..9000usize], 1..6),
        dtype_and_op,
        prop::sample::select(compressions.to_vec()),
        prop::sample::select(vec![64, 200, 4096, 128 << 10]),
        any::<bool>(),
        (factor(), factor(), factor()),
    )
        .prop_map(|(ranks, parts, (dtype, op), compression, slot_bytes, in_place, factors)| Case {
            ranks,
            parts,
            dtype,
            op,
            compression,
            slot_bytes,
            in_place,
            // Nine values of 4 have no product in f16.
            factors: if op == ReduceOp::Product { (1.0, factors.1, factors.2) } else { factors },
        })
}

/// Reduces `inputs` (one per part) on this rank in one operation.
fn allreduce(member: &mut Member, case: &Case, inputs: Vec<Memory>) -> Vec<Vec<u8>> {
    let outputs: Vec<Memory> = match case.in_place {
        true => inputs.clone(),
        false => inputs.iter().map(|input| Memory::zeroed(input.len())).collect(),
    };
    let parts = inputs.into_iter().zip(&outputs).map(|(input, output)| {
        let elements = input.len() / case.dtype.size();
        Part { input, output: output.clone(), elements }
    });
    let (prescale, scale, postscale) = case.factors;
    let reduction = Reduction { dtype: case.compression.wire_dtype(case.dtype), op: case.op, scale };
    let group = member.group.clone();
    let op = ShmAllreduce::new(group, parts.collect(), case.dtype, reduction, prescale, postscale).unwrap();
    member.run(&mut [Box::new(op)]);
    outputs.iter().map(bytes).collect()
}

fn check_values(case: &Case) {
    let results = in_group(case.ranks, case.slot_bytes, |member| {
        let rank = member.transport.rank();
        let input = |(part, &len): (usize, &usize)| {
            encode(case.dtype, &(0..len).map(|element| exact(case.dtype, rank, part, element)).collect::<Vec<_>>())
        };
        let inputs = case.parts.iter().enumerate().map(input).collect();
        allreduce(member, case, inputs)
    });
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "the ranks' bytes differ");
    let (prescale, scale, postscale) = if case.dtype.is_float() { case.factors } else { (1.0, 1.0, 1.0) };
    for (part, result) in results[0].iter().enumerate() {
        for (element, got) in decode(case.dtype, result).into_iter().enumerate() {
            let values: Vec<f64> =
                (0..case.ranks).map(|rank| exact(case.dtype, rank, part, element) * prescale).collect();
            let want = expected(case.op, case.dtype, &values) * scale * postscale;
            let bound = if case.op == ReduceOp::Average { want.abs() * 0.005 } else { 0.0 };
            assert!((got - want).abs() <= bound, "part {part} element {element}: {got} instead of {want}");
        }
    }
}

/// What is added up is random, so that an other order or rounding would show.
fn check_neighbours(case: &Case) {
    in_group(case.ranks, case.slot_bytes, |member| {
        let rank = member.transport.rank();
        let input = |(part, &len): (usize, &usize)| {
            let value = |element| hash(rank, part, element) as f64 / u64::MAX as f64 - 0.5;
            encode(case.dtype, &(0..len).map(value).collect::<Vec<_>>())
        };
        let fused = allreduce(member, case, case.parts.iter().enumerate().map(input).collect());
        for (part, together) in case.parts.iter().enumerate().zip(fused) {
            let alone = allreduce(member, case, vec![input(part)]);
            assert!(alone[0] == together, "part {} differs when it is fused", part.0);
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn allreduce_gives_the_reference_and_identical_bytes(case in cases()) {
        watched(move || check_values(&case));
    }

    #[test]
    fn an_element_has_the_same_bits_alone_and_among_others(case in cases(), single in any::<bool>()) {
        let dtype = if single { DType::F32 } else { DType::F64 };
        let case = Case { dtype, factors: (1.1, 1.0 / 3.0, 0.7), op: ReduceOp::Sum, ..case };
        watched(move || check_neighbours(&case));
    }

    #[test]
    fn broadcast_and_allgather_move_every_byte(
        lens in prop::collection::vec(0..5000usize, 1..=9), root in any::<prop::sample::Index>(), large in any::<bool>(),
    ) {
        let root = root.index(lens.len());
        watched(move || check_movement(&lens, root, if large { 64 << 10 } else { 64 }));
    }
}

fn check_movement(lens: &[usize], root: usize, slot_bytes: usize) {
    let content = |rank: usize| (0..lens[rank]).map(move |at| hash(rank, 0, at) as u8).collect::<Vec<u8>>();
    let gathered: Vec<u8> = (0..lens.len()).flat_map(content).collect();
    in_group(lens.len(), slot_bytes, |member| {
        let (group, rank) = (member.group.clone(), member.transport.rank());
        let memory = match rank == root {
            true => Memory::from_vec(content(root)),
            false => Memory::zeroed(lens[root]),
        };
        let output = Memory::zeroed(gathered.len());
        let broadcast = ShmBroadcast::new(group.clone(), memory.clone(), root).unwrap();
        let allgather =
            ShmAllgather::new(group.clone(), Memory::from_vec(content(rank)), output.clone(), lens).unwrap();
        let barrier = ShmBarrier::new(group);
        member.run(&mut [Box::new(broadcast), Box::new(allgather), Box::new(barrier)]);
        assert_eq!(bytes(&memory), content(root));
        assert_eq!(bytes(&output), gathered);
    });
}

#[test]
fn the_input_of_an_allgather_may_be_its_place_in_the_output() {
    watched(|| {
        in_group(3, 64, |member| {
            let (output, rank) = (Memory::zeroed(300), member.transport.rank());
            let input = output.slice(100 * rank..100 * rank + 100);
            // SAFETY: no operation uses the memory yet.
            unsafe { input.as_mut_slice().fill(rank as u8 + 1) };
            let op = ShmAllgather::new(member.group.clone(), input, output.clone(), &[100; 3]).unwrap();
            member.run(&mut [Box::new(op)]);
            assert_eq!(bytes(&output), [[1; 100], [2; 100], [3; 100]].concat());
        });
    });
}

/// An allreduce of ones in place, and its memory.
fn sum_of_ones(group: &Arc<ShmGroup>, elements: usize) -> (Box<dyn Collective>, Memory) {
    let memory = Memory::from_vec(vec![1i32; elements]);
    let part = Part { input: memory.clone(), output: memory.clone(), elements };
    let reduction = Reduction { dtype: DType::I32, op: ReduceOp::Sum, scale: 1.0 };
    let op = ShmAllreduce::new(group.clone(), vec![part], DType::I32, reduction, 1.0, 1.0).unwrap();
    (Box::new(op), memory)
}

#[test]
fn queued_operations_may_be_polled_in_any_order() {
    watched(|| {
        in_group(3, 64, |member| {
            let group = member.group.clone();
            let (ops, memories): (Vec<_>, Vec<_>) =
                [1, 500, 0, 33, 2000, 7].map(|elements| sum_of_ones(&group, elements)).into_iter().unzip();
            let mut ops = ops;
            match member.transport.rank() {
                0 => ops.reverse(),
                1 => ops.rotate_left(3),
                _ => (),
            }
            member.run(&mut ops);
            let three = 3i32.to_le_bytes();
            assert!(memories.iter().flat_map(bytes).enumerate().all(|(at, byte)| byte == three[at % 4]));
        });
    });
}

#[test]
fn sleepers_are_always_woken() {
    for ranks in [2, 3, 5] {
        watched(move || {
            in_group(ranks, 128, |member| {
                member.spins = 0;
                for turn in 0..4000 {
                    let group = member.group.clone();
                    let (mut op, memory) = sum_of_ones(&group, 1 + hash(0, 0, turn) as usize % 100);
                    if hash(member.transport.rank(), 1, turn).is_multiple_of(50) {
                        std::thread::yield_now();
                    }
                    member.run(std::slice::from_mut(&mut op));
                    assert_eq!(bytes(&memory)[0], ranks as u8);
                }
                assert!(member.longest_nap < Duration::from_secs(4), "a wake-up was lost");
            });
        });
    }
}

#[test]
fn eight_ranks_on_few_cores_make_progress() {
    watched(|| {
        let start = Instant::now();
        in_group(8, 16 << 10, |member| {
            for _ in 0..20 {
                let group = member.group.clone();
                let (mut op, memory) = sum_of_ones(&group, 100_000);
                member.run(std::slice::from_mut(&mut op));
                assert_eq!(bytes(&memory)[..4], 8i32.to_le_bytes());
            }
            assert!(member.longest_nap < Duration::from_secs(4), "a wake-up was lost");
        });
        eprintln!("8 ranks, 20 times 400 kB: {:?}", start.elapsed());
    });
}

#[test]
fn nobody_shares_where_rank_0_cannot() {
    watched(|| {
        let results = support::on_each(worlds(3), |mut rank| {
            let group = form(&mut *rank, usize::MAX >> 1).unwrap();
            support::close(rank);
            group.is_none()
        });
        assert_eq!(results, [true; 3]);
    });
}

fn worlds(size: usize) -> Vec<support::Rank> {
    ThreadTransport::world(size).into_iter().map(|rank| Box::new(rank) as support::Rank).collect()
}

/// A network namespace has abstract sockets of its own, so a rank in another one counts as on another host.
#[test]
fn a_rank_in_another_namespace_is_on_another_host() {
    watched(|| {
        let results = support::on_each(worlds(3), |mut rank| {
            // SAFETY: the thread is the test's own and does nothing else with its sockets.
            let apart = rank.rank() == 1
                && unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.is_ok();
            let group = form(&mut *rank, 4096).unwrap();
            support::close(rank);
            (apart, group.is_some())
        });
        if !results[1].0 {
            return skipped("no right to make a network namespace");
        }
        assert!(results.iter().all(|(_, shared)| !shared));
    });
}

#[test]
fn a_rank_that_leaves_before_the_group_is_formed_is_an_error() {
    watched(|| {
        let results = support::on_each(worlds(3), |mut rank| match rank.rank() {
            1 => None,
            _ => Some(form(&mut *rank, 4096).map(|_| ())),
        });
        assert!(matches!(results[0], Some(Err(Error::PeerLost { rank: 1, .. }))), "{:?}", results[0]);
        assert!(matches!(results[2], Some(Err(Error::PeerLost { rank: 1, .. }))), "{:?}", results[2]);
    });
}

#[test]
fn a_rank_that_never_comes_is_an_error_at_the_deadline() {
    watched(|| {
        let mut world = ThreadTransport::world(2);
        let deadline = Instant::now() + Duration::from_millis(200);
        let result = ShmGroup::form(&mut world[0], 4096, deadline);
        assert!(matches!(result, Err(Error::Rendezvous(_))));
        assert!(Instant::now() < deadline + Duration::from_secs(2));
    });
}

#[test]
fn an_operation_given_up_half_way_fails_those_after_it() {
    watched(|| {
        in_group(2, 4096, |member| {
            let group = member.group.clone();
            drop(sum_of_ones(&group, 10));
            let (mut op, _memory) = sum_of_ones(&group, 10);
            assert!(matches!(op.poll(&mut *member.transport), Err(Error::ShutDown(_))));
            assert!(!group.prepare_sleep(&mut *member.transport).unwrap());
        });
    });
}

#[test]
fn a_description_that_does_not_fit_is_refused() {
    in_group(1, 4096, |member| {
        let group = member.group.clone();
        let reduction = Reduction { dtype: DType::F32, op: ReduceOp::Sum, scale: 1.0 };
        let part = |bytes, elements| Part { input: Memory::zeroed(bytes), output: Memory::zeroed(bytes), elements };
        let new = |part, user| ShmAllreduce::new(group.clone(), vec![part], user, reduction, 1.0, 1.0);
        assert!(new(part(40, 11), DType::F32).is_err());
        assert!(new(part(40, usize::MAX / 2), DType::F32).is_err());
        assert!(new(part(40, 10), DType::I32).is_err());
        assert!(ShmBroadcast::new(group.clone(), Memory::empty(), 1).is_err());
        let gather = |sizes: &[usize]| ShmAllgather::new(group.clone(), Memory::zeroed(4), Memory::zeroed(4), sizes);
        assert!(gather(&[4]).is_ok_and(|mut op| op.poll(&mut *member.transport).unwrap()));
        assert!(gather(&[5]).is_err());
        assert!(gather(&[usize::MAX, 4]).is_err());
    });
}
