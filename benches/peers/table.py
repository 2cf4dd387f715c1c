"""Tables from the JSON lines that the programs here and hvd-perf print.

    python3 table.py hosts FILE     between hosts: bus bandwidth, and what it is of the bare streams' and of gloo's
    python3 table.py hierarchical FILE   the hierarchical allreduce beside the flat one
    python3 table.py peers FILE     on one host: times, and the ratios to the targets of the project's speed table

Every line has a `label` in front that says who printed it; lines of one label and case are repetitions, of which the median counts.
"""
import collections
import json
import statistics
import sys

KIB, MIB = 1 << 10, 1 << 20


def read(path):
    """Median of each (label, bench, ranks, bytes, buffer), and of the links each ranks' rate."""
    times, rates = collections.defaultdict(list), collections.defaultdict(list)
    with open(path) as lines:
        for row in map(json.loads, lines):
            if row["bench"] == "streams":
                rates[row["ranks"]].append(row["mbit_per_s"])
            else:
                key = row["label"], row["bench"], row["ranks"], row["bytes"], row.get("buffer", "private")
                times[key].append(row["median_us"])
    middle = lambda table: {key: statistics.median(values) for key, values in table.items()}
    return middle(times), middle(rates)


def human(size):
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def print_table(head, rows):
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |")


def ratio(ours, other):
    return f"{ours / other:.2f}" if ours and other else "–"


def hosts(times, rates):
    rows = []
    for ranks in sorted(rates):
        for size in sorted({key[3] for key in times if key[2] == ranks}):
            micros = lambda label: times.get((label, "allreduce", ranks, size, "private"))
            bus = lambda label: micros(label) and 2 * (ranks - 1) / ranks * size * 8 / micros(label)
            ours, fp16, gloo = bus("hvd"), bus("hvd-fp16"), bus("gloo")
            show = lambda rate: f"{rate:.0f}" if rate else "–"
            rows.append([ranks, human(size), show(rates[ranks]), show(ours), show(gloo), ratio(ours, rates[ranks]),
                         ratio(ours, gloo), ratio(fp16, ours)])
    print_table(["hosts", "size", "streams Mbit/s", "ours", "gloo", "ours / streams", "ours / gloo", "fp16 / none"], rows)


def hierarchical(times, _):
    rows = []
    for ranks, size in sorted({(key[2], key[3]) for key in times}):
        ours, flat = (times.get((label, "allreduce", ranks, size, "private")) for label in ["hvd", "hvd-flat"])
        rows.append([ranks, human(size), f"{ours / 1000:.1f}", f"{flat / 1000:.1f}", ratio(flat, ours)])
    print_table(["ranks", "size", "hierarchical ms", "flat ms", "flat / hierarchical"], rows)


# Who may be the best peer, and which of them is Horovod at its best.
MPI = ["openmpi", "mpich"]
HOROVOD = ["horovod", "horovod-cycle0", "horovod-gloo"]
PEERS = [*MPI, *HOROVOD, "gloo"]


class Case:
    """One size: how fast everybody is, in microseconds; `None` for who is missing."""

    def __init__(self, times, bench, ranks, size, buffer):
        self.times, self.bench, self.ranks, self.size, self.buffer = times, bench, ranks, size, buffer

    def of(self, label, buffer="private"):
        return self.times.get((label, self.bench, self.ranks, self.size, buffer))

    def best(self, labels):
        return min(filter(None, map(self.of, labels)), default=None)

    def goals(self):
        """(what is compared, its time, how many times faster than it ours must be)"""
        size, horovod, best = self.size, self.best(HOROVOD), self.best(PEERS)
        limit = self.of("limit", self.buffer)
        if self.bench != "allreduce":
            return [("Horovod", horovod, 2), ("MPI", self.best(MPI), 1.4)]
        if self.buffer == "shared":
            return [("limit", limit, 0.8), *([("best peer", best, 4.5)] if size >= 64 * MIB else [])] if size >= MIB else []
        if self.ranks > 2:
            return [("best peer", best, 1.0)] if size >= MIB else [("Horovod", horovod, 0.5)]
        if size <= 4 * KIB:
            return [("Horovod", horovod, 2)]
        if size <= 256 * KIB and size >= 64 * KIB:
            return [("Horovod", horovod, 2), ("MPI", self.best(MPI), 0.5)]
        if MIB <= size <= 16 * MIB:
            return [("best peer", best, 0.95), ("limit", limit, 0.85)]
        return [("best peer", best, 2)] if size >= 64 * MIB else []


def peers(times, _):
    rows = []
    for ranks, bench, buffer, size in sorted({(k[2], k[1], k[4], k[3]) for k in times if k[0] == "hvd"}):
        case = Case(times, bench, ranks, size, buffer)
        ours = case.of("hvd", buffer)
        show = lambda micros: f"{micros:.1f}" if micros else "–"
        verdicts = [f"{other / ours:.2f} × {what} (≥ {goal}{'' if other / ours >= goal else ', MISSED'})"
                    for what, other, goal in case.goals() if other]
        rows.append([ranks, bench, buffer, human(size), show(ours), *(show(case.of(label)) for label in PEERS),
                     show(case.of("limit", buffer)), "; ".join(verdicts) or "–"])
    print_table(["ranks", "case", "buffer", "size", "ours µs", *PEERS, "limit", "ours as many times as fast (goal)"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("hosts", "hierarchical", "peers"):
        sys.exit(__doc__)
    {"hosts": hosts, "hierarchical": hierarchical, "peers": peers}[sys.argv[1]](*read(sys.argv[2]))
