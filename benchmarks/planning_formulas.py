"""Formulas of what the attention-update signals cost a large training; ``planning.py`` prints them.

Every figure follows from the model's sizes, the number of GPUs and a few rates, named in
:class:`Gpu`: assumptions, but for the eigensolver's, which were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mcore_monitors.windows import Grid, default_judged, default_windows

#: columns of the packed buffer, per window, of a head and of a group
COLUMNS_HEAD, COLUMNS_GROUP = 16, 6
#: recorded values of a head's Δ2 at a comparison, and of the rest of a head and a group at a record
VALUES_DELTA2, VALUES_HEAD, VALUES_GROUP = 4, 10, 6
#: kernels of a sample on average, default windows; and those that read a layer's weights
LAUNCHES, LAUNCHES_LAYER = 100, 8


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
    """Rates of one GPU of the H100 kind and its host: assumptions where not said otherwise."""

    #: bf16 FLOP/s that training reaches (40% of 989e12)
    training: float = 0.4 * 989e12
    #: FLOP/s of float64 and float32 matrix products (half of 67e12 each)
    gemm: float = 33e12
    #: bytes/s of its memory (75% of 3.35e12)
    memory: float = 2.5e12
    #: seconds of the eigensolver for matrices of m rows, all side by side: this times m, and for
    #: each matrix the second times m³; measured on an H100 for 64 to 256 rows
    eigensolver_row: float = 19e-6
    eigensolver_cube: float = 2.7e-12
    #: bytes/s of an all-reduce over the network, and seconds before the first byte
    network: float = 25e9
    latency: float = 1e-3
    #: seconds of a kernel launch
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

    Of the four d × d blocks three are computed, 2 d² D each; all four up to d = 32 and D = 256.
    """
    blocks = 4 if 2 * part.d <= 64 and part.hidden <= 256 else 3
    return 2 * blocks * part.d**2 * part.hidden * (heads + groups)


def delta2_flops(part: Part, heads: int) -> float:
    """FLOPs of the small products of Δ2 for one window, U (B Bᵀ) Uᵀ of size 2d.

    Ten products of d × d in blocks; two of 2d × 2d up to d = 32, where matrices stay whole.
    """
    return (20 if 2 * part.d > 64 else 32) * part.d**3 * heads


def delta3_flops(part: Part, heads: int) -> float:
    """FLOPs of the small products of Δ3 for one window: two of d × d."""
    return 4 * part.d**3 * heads


def eigensolver_seconds(d: int, heads: int, times: float, records: float, gpu: Gpu) -> float:
    """Seconds of the eigenproblems of a sample: Δ2's of 2d rows, and three of d rows at a record.

    Args:
        times, records: of :func:`a_sample`.
    """

    def solved(rows: int, matrices: float) -> float:
        return gpu.eigensolver_row * rows + gpu.eigensolver_cube * rows**3 * matrices

    return times * solved(2 * d, heads) + records * solved(d, 3 * heads)


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
        COLUMNS_HEAD * p.heads + COLUMNS_GROUP * most_groups(model) for p in model.parts
    )
    return 8 * windows * model.layers * per_layer


def most_groups(model: Model) -> int:
    """Query groups of a layer, as the buffer counts them for every part."""
    return max(part.groups for part in model.parts)


def values(model: Model, comparisons: float, records: float) -> float:
    """Values written for one sample with so many comparisons and records."""
    per_layer = sum(
        (VALUES_DELTA2 * comparisons + VALUES_HEAD * records) * part.heads
        + VALUES_GROUP * records * most_groups(model)
        for part in model.parts
    )
    return model.layers * per_layer


def step_seconds(model: Model, gpus: int, gpu: Gpu) -> float:
    """Seconds of a training step: 6 FLOPs a token and active parameter.

    The batch grows with the machine where it must: 16,384 tokens a replica at least.
    """
    tokens = max(model.tokens, 16_384 * replicas(model, gpus))
    return 6 * model.active * tokens / (gpus * gpu.training)


def a_sample(grid: Grid) -> tuple[float, float]:
    """(comparisons, records) of a sample on average: windows with Δ2, and with all matrices."""
    return (
        sum(grid.interval / grid.stride(window) for window in grid.windows),
        sum(grid.interval / grid.record(window) for window in grid.windows),
    )


def plan(model: Model, gpus: int, interval: int, gpu: Gpu | None = None, width: int = 4) -> dict:
    """One row of the table: what a sample costs the rank that has most, and the run.

    Args:
        interval: iterations between two samples.
        width: bytes of a weight as it is kept: 4 for fp32 main weights, 2 for bfloat16.
    """
    gpu = gpu or Gpu()
    windows = default_windows(interval)
    grid = Grid(windows, interval, default_judged(windows))
    times, records = a_sample(grid)
    flops = moved = held = solved = reading = 0.0
    for part in model.parts:
        heads, groups = share(model, part, gpus)
        flops += times * (gram_flops(part, heads, groups) + delta2_flops(part, heads))
        flops += records * delta3_flops(part, heads)
        reading += read_flops(part, heads, groups)
        moved += times * bytes_moved(part, heads, groups, width)
        held += snapshot_bytes(part, heads, groups, width, grid.most_snapshots())
        solved += eigensolver_seconds(part.d, heads, times, records, gpu)
    seconds = {
        "products": max((flops + reading) / gpu.gemm, moved / gpu.memory),
        "eigensolver": solved,
        "launches": gpu.launch * (LAUNCHES + LAUNCHES_LAYER * model.layers / model.pipeline),
        "all-reduce": gpu.latency + 2 * packed_bytes(model, len(windows)) / gpu.network,
        "rank 0": values(model, times, records) * gpu.value,
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
