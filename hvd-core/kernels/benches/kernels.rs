//! Throughput of the kernels, in bytes of memory read and written, beside that of a plain copy.
//!
//! `cargo bench -p hvd-kernels --bench kernels`; with `-- 'L2|memory'` only these sizes.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hvd_kernels::{DType, ReduceOp, reduce, wire};

/// A size that stays in the second-level cache, and one that does not stay in any.
const SIZES: [(&str, usize); 2] = [("L2", 128 << 10), ("memory", 64 << 20)];

/// Bytes that are moderate numbers in every type.
fn ones(len: usize) -> Vec<u8> {
    vec![0x3c; len]
}

fn copy(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy");
    for (name, bytes) in SIZES {
        let (src, mut dst) = (ones(bytes), ones(bytes));
        group.throughput(Throughput::Bytes(2 * bytes as u64));
        group.bench_function(name, |b| b.iter(|| dst.copy_from_slice(&src)));
    }
}

fn accumulate(c: &mut Criterion) {
    let mut group = c.benchmark_group("accumulate");
    for (name, bytes) in SIZES {
        for (op, dtype) in [
            (ReduceOp::Sum, DType::F32),
            (ReduceOp::Sum, DType::F64),
            (ReduceOp::Sum, DType::BF16),
            (ReduceOp::Sum, DType::F16),
            (ReduceOp::Min, DType::F32),
            (ReduceOp::Sum, DType::I8),
        ] {
            let (mut into, from) = (ones(bytes), ones(bytes));
            group.throughput(Throughput::Bytes(3 * bytes as u64));
            let id = BenchmarkId::new(format!("{op:?} {dtype}"), name);
            group.bench_function(id, |b| b.iter(|| reduce::accumulate(op, dtype, &mut into, &from)));
        }
    }
}

fn combine(c: &mut Criterion) {
    let mut group = c.benchmark_group("combine");
    for (name, bytes) in SIZES {
        for (op, dtype, count) in [
            (ReduceOp::Sum, DType::F32, 2),
            (ReduceOp::Average, DType::F32, 2),
            (ReduceOp::Average, DType::F32, 3),
            (ReduceOp::Average, DType::F32, 8),
            (ReduceOp::Average, DType::F64, 3),
            (ReduceOp::Average, DType::BF16, 4),
            (ReduceOp::Average, DType::F16, 4),
        ] {
            let inputs = vec![ones(bytes / 2); count];
            let inputs: Vec<_> = inputs.iter().map(|input| &input[..]).collect();
            let mut out = ones(bytes / 2);
            group.throughput(Throughput::Bytes((count + 1) as u64 * bytes as u64 / 2));
            let id = BenchmarkId::new(format!("{op:?} {count} x {dtype}"), name);
            group.bench_function(id, |b| b.iter(|| reduce::combine(op, dtype, &mut out, &inputs, 1.0)));
        }
    }
}

fn convert(c: &mut Criterion) {
    let mut group = c.benchmark_group("convert");
    for (name, bytes) in SIZES {
        for (from, to) in [
            (DType::F32, DType::F16),
            (DType::F32, DType::BF16),
            (DType::F16, DType::F32),
            (DType::BF16, DType::F32),
            (DType::F64, DType::BF16),
            (DType::F32, DType::F32),
        ] {
            let elements = bytes / 4;
            let (src, mut dst) = (ones(elements * from.size()), ones(elements * to.size()));
            group.throughput(Throughput::Bytes((src.len() + dst.len()) as u64));
            let id = BenchmarkId::new(format!("{from} to {to}"), name);
            group.bench_function(id, |b| b.iter(|| wire::convert(from, &src, to, &mut dst, 0.5)));
        }
    }
}

criterion_group! {
    name = kernels;
    config = Criterion::default().sample_size(10).measurement_time(std::time::Duration::from_millis(500))
        .warm_up_time(std::time::Duration::from_millis(100));
    targets = copy, accumulate, combine, convert
}
criterion_main!(kernels);
