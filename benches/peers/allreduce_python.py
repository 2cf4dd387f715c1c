"""The same table for Horovod or for torch.distributed's gloo (float32, sum, in place, one thread).

    mpirun -np 2 python allreduce_python.py horovod          # HOROVOD_CYCLE_TIME=0 for its fastest small operations
    torchrun --nproc_per_node=2 allreduce_python.py gloo [LABEL [SIZE,SIZE…]]

Two barriers precede each iteration, so that nobody is just waking up; its time is the maximum over the ranks; the median is reported, one JSON line a size.
"""
import json
import os
import statistics
import sys
import time

import torch

TENSORS, COUNT = 200, 16384


class Horovod:
    def __init__(self):
        import horovod.torch as hvd
        hvd.init()
        self.hvd, self.rank, self.ranks = hvd, hvd.rank(), hvd.size()

    def barrier(self):
        self.hvd.barrier()

    def reduce(self, tensor, name):
        self.hvd.allreduce_(tensor, name=name, op=self.hvd.Sum)

    def reduce_all(self, tensors):
        handles = [self.hvd.allreduce_async_(t, name=f"f{i}", op=self.hvd.Sum) for i, t in enumerate(tensors)]
        for handle in handles:
            self.hvd.synchronize(handle)

    def maximum(self, tensor):
        return self.hvd.allreduce(tensor, op=self.hvd.Max, name="maximum")


class Gloo:
    def __init__(self):
        import torch.distributed as dist
        dist.init_process_group("gloo")
        self.dist, self.rank, self.ranks = dist, dist.get_rank(), dist.get_world_size()

    def barrier(self):
        self.dist.barrier()

    def reduce(self, tensor, name):
        self.dist.all_reduce(tensor)

    def reduce_all(self, tensors):
        for work in [self.dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()

    def maximum(self, tensor):
        self.dist.all_reduce(tensor, op=self.dist.ReduceOp.MAX)
        return tensor


def measure(peer, label, bench, size, iterations, warmup, reset, run):
    seconds = []
    for k in range(-warmup, iterations):
        reset()
        peer.barrier()
        peer.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    worst = peer.maximum(torch.tensor(seconds[warmup:], dtype=torch.float64)).tolist()
    if peer.rank == 0:
        median = statistics.median(worst)
        print(json.dumps({"peer": label, "bench": bench, "ranks": peer.ranks, "bytes": size,
                          "median_us": round(median * 1e6, 1), "min_us": round(min(worst) * 1e6, 1),
                          "busbw_gbps": round(2 * (peer.ranks - 1) / peer.ranks * size / median / 1e9, 3)}), flush=True)


def main():
    kind = sys.argv[1]
    label = sys.argv[2] if len(sys.argv) > 2 else kind
    torch.set_num_threads(1)
    peer = {"horovod": Horovod, "gloo": Gloo}[kind]()
    sizes = [int(size) for size in sys.argv[3].split(",")] if len(sys.argv) > 3 else [4096 << 2 * k for k in range(9)]
    for size in sizes:
        tensor = torch.ones(size // 4)
        iterations, warmup = (50, 5) if size <= 1 << 20 else (20, 5) if size <= 16 << 20 else (7, 2)
        measure(peer, label, "allreduce", size, iterations, warmup, lambda: tensor.fill_(1.0),
                lambda: peer.reduce(tensor, f"t{size}"))
        assert tensor[0].item() == tensor[-1].item() == peer.ranks
    if len(sys.argv) <= 3:
        fusion(peer, label)
    if kind == "gloo":
        sys.stdout.flush()
        os._exit(0)  # gloo's tear-down was seen to hang with more ranks than cores


def fusion(peer, label):
    tensors = [torch.ones(COUNT) for _ in range(TENSORS)]
    measure(peer, label, "fusion_200x64KiB", TENSORS * COUNT * 4, 20, 3, lambda: [t.fill_(1.0) for t in tensors],
            lambda: peer.reduce_all(tensors))


if __name__ == "__main__":
    main()
