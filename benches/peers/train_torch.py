"""The peer a user would pick instead: the same GPT in plain PyTorch, one process or DistributedDataParallel.

    python train_torch.py --preset small --threads 2
    torchrun --nproc_per_node=2 train_torch.py --preset small --threads 1

Written with PyTorch's own best habits: scaled_dot_product_attention, fused AdamW, bf16 autocast,
gradient_as_bucket_view, set_to_none. Prints one JSON line from rank 0: the median step time, tokens/s over all
ranks and the last loss, on random tokens (those of `train --benchmark`), so that it measures speed alone.
"""
import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# name: layers, heads, width, feed-forward width, context, vocabulary, sequences per rank and step
PRESETS = {
    "tiny": (4, 4, 128, 512, 64, 256, 12),
    "small": (6, 6, 384, 1536, 256, 256, 16),
    "gpt2": (12, 12, 768, 3072, 512, 50257, 2),
}


class Block(nn.Module):
    def __init__(self, width, heads, ff):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ff), nn.Linear(ff, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.ln1(x)).split(d, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, layers, heads, width, ff, context, vocab):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, ff) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tok.weight
        self.apply(self.init)

    @staticmethod
    def init(m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)

    def forward(self, ids, targets):
        x = self.tok(ids) + self.pos.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--preset", default="small", choices=PRESETS)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--device", default="cpu")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--batch", type=int, default=0)
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--warmup", type=int, default=3)
    a = p.parse_args()

    *shape, batch = PRESETS[a.preset]
    batch = a.batch or batch
    context, vocab = shape[4], shape[5]
    ddp = "RANK" in os.environ
    cuda = a.device.startswith("cuda")
    if ddp:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if ddp else (0, 1)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1337)
    raw = model = Gpt(*shape).to(device)
    decay = [q for q in raw.parameters() if q.dim() > 1]
    rest = [q for q in raw.parameters() if q.dim() <= 1]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                            lr=3e-4, betas=(0.9, 0.95), fused=True)
    if a.compile:
        model = torch.compile(model)
    if ddp:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    draw = torch.Generator().manual_seed(rank)
    times = []
    for step in range(a.warmup + a.steps):
        batches = [torch.randint(vocab, (batch, context + 1), generator=draw).to(device) for _ in range(a.accumulate)]
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i, tokens in enumerate(batches):
            if ddp:
                model.require_backward_grad_sync = i + 1 == a.accumulate
            with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=a.dtype == "bfloat16"):
                loss = model(tokens[:, :-1], tokens[:, 1:])
            (loss / a.accumulate).backward()
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        if step >= a.warmup:
            times.append(time.perf_counter() - start)
    if rank == 0:
        step = statistics.median(times)
        print(json.dumps({"peer": "torch" + ("+ddp" if ddp else "") + ("+compile" if a.compile else ""),
                          "preset": a.preset, "dtype": a.dtype, "ranks": world, "threads": a.threads, "batch": batch,
                          "step_ms": round(step * 1e3, 2),
                          "tokens_per_s": round(world * batch * context * a.accumulate / step, 1),
                          "loss": round(loss.item(), 4)}))
    if ddp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
