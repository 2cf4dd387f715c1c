"""The same model and the same training once more, in plain PyTorch: shares nothing with transformer-lm but the names of the weights.

usage: parity.py FOLDER

Reads settings.json, weights.safetensors and data.safetensors (tokens: steps, micro-batches, B, T+1) of the folder; writes
logits.safetensors (of the first micro-batch), gradients.safetensors (of the mean loss over the first step's micro-batches, before
clipping), trained.safetensors (the weights after all steps) and losses.json (of each step, before its update).
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def positions(length, width, dtype):
    """Vaswani et al., 2017, section 3.5."""
    place = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    rate = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.zeros(length, width, dtype=torch.float64)
    table[:, 0::2] = torch.sin(place * rate)
    table[:, 1::2] = torch.cos(place * rate)[:, : width // 2]
    return table.to(dtype)


def norm(x, weights, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def dense(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, weights, name, heads):
    batch, length, width = x.shape
    split = dense(x, weights, f"{name}.c_attn").view(batch, length, 3, heads, width // heads)
    q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, hs)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = torch.softmax(scores.masked_fill(future, -math.inf), -1) @ v
    return dense(mixed.transpose(1, 2).reshape(batch, length, width), weights, f"{name}.c_proj")


def forward(ids, weights, settings):
    length, width = ids.shape[1], weights["wte.weight"].shape[1]
    table = weights.get("wpe.weight")
    if table is None:
        table = positions(length, width, weights["wte.weight"].dtype)
    x = weights["wte.weight"][ids] + table[:length]
    for layer in range(settings["layers"]):
        x = x + attention(norm(x, weights, f"h.{layer}.ln_1"), weights, f"h.{layer}.attn", settings["heads"])
        hidden = gelu(dense(norm(x, weights, f"h.{layer}.ln_2"), weights, f"h.{layer}.mlp.c_fc"))
        x = x + dense(hidden, weights, f"h.{layer}.mlp.c_proj")
    return norm(x, weights, "ln_f") @ weights["wte.weight"].T


def loss_of(batches, weights, settings):
    """The mean over all tokens of all micro-batches."""
    losses = []
    for batch in batches:
        logits = forward(batch[:, :-1], weights, settings)
        chosen = torch.log_softmax(logits, -1).gather(-1, batch[:, 1:].unsqueeze(-1))
        losses.append(-chosen.flatten())
    return torch.cat(losses).mean()


def train(data, weights, settings):
    matrices = [weight for weight in weights.values() if weight.dim() >= 2]
    others = [weight for weight in weights.values() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=tuple(settings["betas"]), eps=settings["eps"])
    losses = []
    for step, batches in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * min(1.0, (step + 1) / settings["warmup_steps"])
        optimizer.zero_grad()
        loss = loss_of(batches, weights, settings)
        loss.backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(weights.values(), settings["max_grad_norm"])
        assert gradient_norm > settings["max_grad_norm"], "the data is to make clipping do something"
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(folder):
    settings = json.loads((folder / "settings.json").read_text())
    data = load_file(folder / "data.safetensors")["tokens"]
    weights = {name: weight.requires_grad_() for name, weight in load_file(folder / "weights.safetensors").items()}
    logits = forward(data[0][0][:, :-1], weights, settings)
    save_file({"logits": logits.detach()}, folder / "logits.safetensors")
    loss_of(data[0], weights, settings).backward()
    save_file({name: weight.grad for name, weight in weights.items()}, folder / "gradients.safetensors")
    losses = train(data, weights, settings)
    save_file({name: weight.detach() for name, weight in weights.items()}, folder / "trained.safetensors")
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
