"""What the attention-update signals cost a large training: FLOPs, bytes, memory, share of a step.

    python benchmarks/planning.py                            # the plan, and its check
    python benchmarks/planning.py --write docs/planning.md   # both tables in the document

Every figure is a formula of the model's sizes, the number of GPUs and a few rates; the functions
below are those formulas, with units. The same formulas are checked against what can be measured
here: FLOPs that PyTorch counts, bytes that the monitor holds and reduces, and the CPU time of a
sample, at sizes for which a CPU is enough. No GPU was measured: the rates of one are assumptions,
named in :class:`Gpu`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mcore_monitors.windows import Grid, default_judged, default_windows

#: columns of the packed buffer and recorded values, of a head and of a group, per window
COLUMNS_HEAD, COLUMNS_GROUP, COLUMNS_PERSISTENCE = 12, 6, 3
VALUES_HEAD, VALUES_GROUP, VALUES_PERSISTENCE = 14, 6, 2


@dataclass(frozen=True, kw_only=True)
class Part:
    """Equal heads of a layer: ``H`` query heads, ``G`` keys, ``d`` channels, ``D`` hidden size."""

    heads: int
    groups: int
    d: int
    hidden: int
    #: inner sizes of low-rank projections (latent attention), 0 where W_q and W_k are stored
    rank_query: int = 0
    rank_key: int = 0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and how it is trained."""

    name: str
    layers: int
    parts: tuple[Part, ...]
    #: parameters that a token goes through
    active: float
    #: tokens of a global batch
    tokens: float
    tensor: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Rates of one GPU of the H100 kind and its host: assumptions, not measurements."""

    #: bf16 FLOP/s that training reaches (40% of 989e12)
    training: float = 0.4 * 989e12
    #: FLOP/s of float64 and float32 matrix products (half of 67e12 each)
    gemm: float = 33e12
    #: bytes/s of its memory (75% of 3.35e12)
    memory: float = 2.5e12
    #: seconds of the eigensolver for one head and window: one problem after another, as reported
    #: by others for 18 heads; a batched solver is an order of magnitude faster
    eigensolver: float = 15e-3
    #: bytes/s of an all-reduce over the network, and seconds before the first byte
    network: float = 25e9
    latency: float = 1e-3
    #: seconds of a kernel launch, of which a sample has about 600 and 8 a layer
    launch: float = 5e-6
    #: seconds that rank 0's Python takes for one recorded value
    value: float = 1.5e-6


MODELS = (
    Model(
        name="7B dense",
        layers=32,
        parts=(Part(heads=32, groups=32, d=128, hidden=4096),),
        active=6.7e9,
        tokens=4e6,
        tensor=2,
        pipeline=1,
    ),
    Model(
        name="70B GQA",
        layers=80,
        parts=(Part(heads=64, groups=8, d=128, hidden=8192),),
        active=70e9,
        tokens=16e6,
        tensor=8,
        pipeline=4,
    ),
    Model(
        name="671B MLA-MoE",
        layers=61,
        parts=(
            Part(heads=128, groups=128, d=128, hidden=7168, rank_query=1536, rank_key=512),
            Part(heads=128, groups=1, d=64, hidden=7168, rank_query=1536),
        ),
        active=37e9,
        tokens=63e6,
        tensor=1,
        pipeline=16,
    ),
)
GPUS = (64, 512, 2048, 8192)
INTERVALS = (10, 50)


def share(model: Model, part: Part, gpus: int) -> tuple[int, int]:
    """(heads, keys) of the rank that has most.

    A rank holds ceil(layers / pipeline) × groups / tensor groups (one a layer at least) together
    with gpus / (tensor × pipeline) replicas. Groups are dealt out over these in turn; where there
    are more replicas than groups, slices of the heads of a group are, and each has the key.
    """
    held = math.ceil(model.layers / model.pipeline) * max(1, part.groups // model.tensor)
    per_group = part.heads // max(part.groups, min(model.tensor, part.heads))
    slices = min(per_group, max(1, math.ceil(replicas(model, gpus) / held)))
    while per_group % slices:
        slices += 1
    units = math.ceil(held * slices / replicas(model, gpus))
    return units * per_group // slices, units


def replicas(model: Model, gpus: int) -> int:
    """Ranks that hold the same attention weights."""
    return gpus // (model.tensor * model.pipeline)


def gram_flops(part: Part, heads: int, groups: int) -> float:
    """FLOPs of the Gram matrices of [ΔW; W] for one window: 6 d² D a head and a group.

    Of the four d × d blocks three are computed, 2 d² D each.
    """
    return 6 * part.d**2 * part.hidden * (heads + groups)


def small_gemm_flops(part: Part, heads: int) -> float:
    """FLOPs of the small products for one window: Lᵀ (B Bᵀ) L of sizes 2d and d, 4 n³ each."""
    return 4 * ((2 * part.d) ** 3 + part.d**3) * heads


def solver_flops(part: Part, heads: int, groups: int) -> float:
    """FLOPs of Cholesky (n³/3, n = 2d) and of reducing to tridiagonal form (4/3 n³ each)."""
    n = 2 * part.d
    return n**3 / 3 * heads + 4 / 3 * (n**3 * heads + part.d**3 * (2 * heads + groups))


def read_flops(part: Part, heads: int, groups: int) -> float:
    """FLOPs of reading low-rank projections as [d, D] a head: 2 d r D a sample, 0 where stored."""
    per_row = part.rank_query * heads + part.rank_key * groups
    return 2 * part.d * part.hidden * per_row


def bytes_moved(part: Part, heads: int, groups: int, width: int) -> float:
    """Bytes to and from memory for one window: 2 width + 72 a weight, were there no cache.

    Both weights are read, widened to float64 (8 + 8 written), subtracted (24) and multiplied
    (32 read).
    """
    return (2 * width + 72) * part.d * part.hidden * (heads + groups)


def snapshot_bytes(part: Part, heads: int, groups: int, width: int, snapshots: int) -> float:
    """Bytes of the snapshots of one rank: ``width`` a weight, ``snapshots`` at once."""
    return snapshots * width * part.d * part.hidden * (heads + groups)


def packed_bytes(model: Model, windows: int) -> float:
    """Bytes of the packed all-reduce: float64 columns of every head and group, each window."""
    per_layer = sum(
        (COLUMNS_HEAD + COLUMNS_PERSISTENCE) * p.heads + COLUMNS_GROUP * most_groups(model)
        for p in model.parts
    )
    return 8 * windows * model.layers * per_layer


def most_groups(model: Model) -> int:
    """Query groups of a layer, as the buffer counts them for every part."""
    return max(part.groups for part in model.parts)


def values(model: Model, comparisons: float) -> float:
    """Recorded values of one sample with so many comparisons; absent ones are null, and written."""
    per_layer = sum(
        VALUES_HEAD * part.heads + VALUES_GROUP * most_groups(model) for part in model.parts
    )
    return comparisons * model.layers * per_layer


def step_seconds(model: Model, gpus: int, gpu: Gpu) -> float:
    """Seconds of a training step: 6 FLOPs a token and active parameter.

    The batch grows with the machine where it must: 16,384 tokens a replica at least.
    """
    tokens = max(model.tokens, 16_384 * replicas(model, gpus))
    return 6 * model.active * tokens / (gpus * gpu.training)


def comparisons(grid: Grid) -> float:
    """Windows compared at a sample, on average."""
    return sum(grid.interval / grid.stride(window) for window in grid.windows)


def plan(model: Model, gpus: int, interval: int, gpu: Gpu | None = None, width: int = 4) -> dict:
    """One row of the table: what a sample costs the rank that has most, and the run.

    Args:
        interval: iterations between two samples.
        width: bytes of a weight as it is kept: 4 for fp32 main weights, 2 for bfloat16.
    """
    gpu = gpu or Gpu()
    windows = default_windows(interval)
    grid = Grid(windows, interval, default_judged(windows))
    times = comparisons(grid)
    flops = moved = held = solved = reading = 0.0
    for part in model.parts:
        heads, groups = share(model, part, gpus)
        flops += times * (gram_flops(part, heads, groups) + small_gemm_flops(part, heads))
        reading += read_flops(part, heads, groups)
        moved += times * bytes_moved(part, heads, groups, width)
        held += snapshot_bytes(part, heads, groups, width, grid.most_snapshots())
        solved += times * heads
    seconds = {
        "products": max((flops + reading) / gpu.gemm, moved / gpu.memory),
        "eigensolver": solved * gpu.eigensolver,
        "launches": gpu.launch * (600 + 8 * model.layers / model.pipeline),
        "all-reduce": gpu.latency + 2 * packed_bytes(model, len(windows)) / gpu.network,
        "rank 0": values(model, times) * gpu.value,
    }
    step = step_seconds(model, gpus, gpu)
    return {
        "model": model.name,
        "gpus": gpus,
        "interval": interval,
        "flops": flops + reading,
        "bytes": moved,
        "memory": held,
        "seconds": seconds,
        "step_seconds": step,
        "share": sum(seconds.values()) / (interval * step),
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    head = (
        "| model | GPUs | step | interval | GFLOP | GB moved | snapshots | eigensolver | rank 0 | "
        "sample | share of a step |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            f"| {row['model']} | {row['gpus']:,} | {row['step_seconds']:.2f} s | "
            f"{row['interval']} | {row['flops'] / 1e9:,.0f} | {row['bytes'] / 1e9:.2f} | "
            f"{row['memory'] / 2**20:,.0f} MiB | {1000 * seconds['eigensolver']:,.0f} ms | "
            f"{1000 * seconds['rank 0']:,.0f} ms | {1000 * sum(seconds.values()):,.0f} ms | "
            f"{100 * row['share']:.2f}% |\n"
        )
    return head + "".join(lines)


def all_rows() -> list[dict]:
    """The table's rows."""
    return [plan(m, gpus, i) for m in MODELS for gpus in GPUS for i in INTERVALS]


# ---- the check against what can be measured on a CPU ----

#: layers, query heads, query groups, head dimension, hidden size
SIZES = ((4, 4, 4, 32, 128), (4, 8, 2, 64, 512), (2, 16, 16, 64, 1024), (2, 8, 8, 128, 2048))
WINDOW = 50


def _median_seconds(call: Callable[[], Any], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    return sorted(seconds)[times // 2]


def check(size: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """Predicted and measured FLOPs, bytes and CPU seconds of one sample of one window.

    The rates for the predicted time are measured apart, on problems of the same shapes: float64
    products, the eigensolver, and the monitor itself at the smallest size for what every sample
    costs.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mcore_monitors.parallel import Packed

    torch.set_num_threads(1)
    layers, heads, groups, d, hidden = size
    part = Part(heads=layers * heads, groups=layers * groups, d=d, hidden=hidden)
    monitor, train, packed_here = _live(*size)
    packed = Packed(packed_here, torch.device("cpu"))

    def samples(first: int, count: int) -> list[float]:
        taken = []
        for iteration in range(first, first + 10 * count, 10):
            train()
            start = time.thread_time()
            monitor.collect(iteration, packed.fields)
            taken.append(time.thread_time() - start)
        return taken

    samples(10, 5)
    with FlopCounterMode(display=False) as counter:
        samples(60, 1)
    # every fifth sample looks for directions that persist as well: those are left out here
    taken = [t for i, t in enumerate(samples(70, 12)) if (7 + i) % 5]
    measured = sorted(taken)[len(taken) // 2]

    pair = torch.randn(max(1, 2**21 // (16 * d * hidden)), 2 * d, hidden, dtype=torch.float64)
    rate = 8 * d * d * hidden * len(pair) / _median_seconds(lambda: pair @ pair.mT)
    small = torch.randn(part.heads, 2 * d, 2 * d, dtype=torch.float64)
    small = small @ small.mT
    single = small[:, :d, :d].repeat(3, 1, 1)
    solver = sum(_median_seconds(lambda m=m: torch.linalg.eigvalsh(m)) for m in (small, single))
    gemm = gram_flops(part, part.heads, part.groups) + small_gemm_flops(part, part.heads)
    moved = bytes_moved(part, part.heads, part.groups, 4)
    copy = torch.empty(2**21, dtype=torch.float64)
    bandwidth = 2 * copy.nbytes / _median_seconds(lambda: copy.clone())
    model = Model(
        name="",
        layers=layers,
        parts=(Part(heads=heads, groups=groups, d=d, hidden=hidden),),
        active=0,
        tokens=0,
        tensor=1,
        pipeline=1,
    )
    snapshots = Grid([WINDOW], 10).most_snapshots()
    return {
        "size": size,
        "flops": (gemm, counter.get_total_flops()),
        "snapshot_bytes": (
            snapshot_bytes(part, part.heads, part.groups, 4, snapshots),
            monitor.snapshot_bytes,
        ),
        "packed_bytes": (packed_bytes(model, 1), packed.nbytes),
        "seconds": (gemm / rate + solver + moved / bandwidth, measured),
    }


def _live(layers: int, heads: int, groups: int, d: int, hidden: int) -> tuple[Any, Any, Any]:
    """A monitor on random weights, a function that trains them, and the fields of its buffer."""
    import torch

    from mcore_monitors.monitors.attention_update import AttentionUpdateMonitor
    from mcore_monitors.views import AttentionView, ModelView

    weights = [
        (torch.randn(heads, d, hidden), torch.randn(groups, d, hidden)) for _ in range(layers)
    ]
    view = ModelView(
        layers=layers,
        heads=heads,
        groups=groups,
        experts=1,
        device=torch.device("cpu"),
        activation_dtype=torch.float32,
        sequence_length=8,
        attention=[
            AttentionView(
                layer=i,
                first_group=0,
                groups=groups,
                heads_per_group=heads // groups,
                read=lambda pair=pair: pair,
            )
            for i, pair in enumerate(weights, start=1)
        ],
    )

    def train() -> None:
        for pair in weights:
            for weight in pair:
                weight += 1e-3 * torch.randn(weight.shape)

    monitor = AttentionUpdateMonitor(view, [WINDOW], 10)
    return monitor, train, monitor.schema()


def check_table(checks: list[dict[str, Any]]) -> str:
    """Predicted beside measured, as Markdown."""
    text = (
        "| layers × heads (groups), d, D | MFLOP, predicted / counted | snapshots, predicted / "
        "held | packed buffer, predicted / real | CPU ms, predicted / measured |\n"
        "|---|---|---|---|---|\n"
    )
    for row in checks:
        layers, heads, groups, d, hidden = row["size"]
        flops, held, packed, seconds = (
            row[name] for name in ("flops", "snapshot_bytes", "packed_bytes", "seconds")
        )
        text += (
            f"| {layers} × {heads} ({groups}), {d}, {hidden} | {flops[0] / 1e6:,.1f} / "
            f"{flops[1] / 1e6:,.1f} | {held[0]:,.0f} / {held[1]:,} B | {packed[0]:,.0f} / "
            f"{packed[1]:,} B | {1000 * seconds[0]:.1f} / {1000 * seconds[1]:.1f} |\n"
        )
    return text


def put(document: str, name: str, text: str) -> str:
    """Put a table between the marks ``<!-- name -->`` and ``<!-- end of name -->``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, rest = document.split(begin)
    return head + begin + text + end + rest.split(end)[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/planning.py --json planning.json",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--write", type=Path, help="put the tables into this document")
    arguments = parser.parse_args()
    planned = table(all_rows())
    print(planned)
    checks = []
    for number, size in enumerate(SIZES, start=1):
        print(f"measuring {number} of {len(SIZES)}", file=sys.stderr)
        checks.append(check(size))
    print(check_table(checks))
    if arguments.write:
        document = put(arguments.write.read_text(), "plan", planned)
        arguments.write.write_text(put(document, "check", check_table(checks)))
    if arguments.json:
        made_by = {
            "command": " ".join(["python", "benchmarks/planning.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {n: version(n) for n in ("mcore-monitors", "torch")},
        }
        result = {"rows": all_rows(), "checks": checks, "made_by": made_by}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
