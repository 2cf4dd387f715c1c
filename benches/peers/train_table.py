"""Tables from the JSON lines of `train --benchmark` and train_torch.py, as scripts/bench_train.sh keeps them.

    python3 train_table.py FILE

Every line has a `label` in front that says who printed it; lines of one label, preset and dtype are repetitions, of which the median counts.
"""
import collections
import json
import statistics
import sys

from table import print_table, ratio

# (ours, the peer, by how many times ours shall be faster, by preset and dtype)
COMPARISONS = [
    ("hvd-2-threads", "torch-2-threads",
     {("tiny", "float32"): 1.5, ("small", "float32"): 1.15, ("small", "bfloat16"): 2.0, ("gpt2", "float32"): 1.1,
      ("gpt2", "bfloat16"): 2.0}),
    ("hvd-2-threads", "torch-compiled",
     {("tiny", "float32"): 1.4, ("small", "float32"): 1.25, ("small", "bfloat16"): 2.0, ("gpt2", "float32"): 1.08,
      ("gpt2", "bfloat16"): 1.6}),
    ("hvd-2-ranks", "torch-ddp",
     {("tiny", "float32"): 1.6, ("small", "float32"): 1.15, ("small", "bfloat16"): 2.0, ("gpt2", "bfloat16"): 2.0}),
    ("hvd-1-thread", "torch-1-thread", {}),
]


def read(path):
    """Medians of each (label, preset, dtype): tokens/s, loss, share of the time spent waiting."""
    rows = collections.defaultdict(list)
    with open(path) as lines:
        for row in map(json.loads, lines):
            rows[row["label"], row["preset"], row["dtype"]].append((row["tokens_per_s"], row["loss"], row.get("waiting", 0)))
    return {key: [statistics.median(column) for column in zip(*values)] for key, values in rows.items()}


def compare(rows, models):
    for preset, dtype in models:
        for ours, peer, goals in COMPARISONS:
            mine, theirs = rows.get((ours, preset, dtype)), rows.get((peer, preset, dtype))
            if mine and theirs:
                yield [preset, dtype, f"{mine[0]:.0f}", peer, f"{theirs[0]:.0f}", ratio(mine[0], theirs[0]),
                       goals.get((preset, dtype), "–"), f"{100 * (mine[1] / theirs[1] - 1):+.2f} %"]


def scaling(rows, models):
    for preset, dtype in models:
        speed = lambda label: rows.get((label, preset, dtype), [None])[0]
        two = rows.get(("hvd-2-ranks", preset, dtype))
        if two and speed("hvd-1-thread"):
            yield [preset, dtype, ratio(two[0], speed("hvd-1-thread")), ratio(speed("torch-ddp"), speed("torch-1-thread")),
                   f"{100 * two[2]:.2f} %"]


def main(path):
    rows = read(path)
    models = sorted({key[1:] for key in rows}, key=lambda model: (["tiny", "small", "gpt2"].index(model[0]), model[1] != "float32"))
    print_table(["preset", "dtype", "ours tokens/s", "peer", "tokens/s", "times", "goal", "loss beside"], list(compare(rows, models)))
    scales = list(scaling(rows, models))
    if scales:
        print("\n1 rank of 1 thread to 2 ranks:")
        print_table(["preset", "dtype", "ours", "DDP", "ours waits"], scales)


if __name__ == "__main__":
    main(sys.argv[1])
