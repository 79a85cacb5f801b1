"""What the attention-update signals cost a large training: FLOPs, bytes, memory, share of a step.

    python benchmarks/planning.py                            # the plan, and its check
    python benchmarks/planning.py --write docs/planning.md   # both tables in the document

The formulas are in ``planning_formulas.py``. They are checked against what can be measured here:
FLOPs that PyTorch counts, bytes that the monitor holds and reduces, and the CPU time of a sample,
at sizes for which a CPU is enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from planning_formulas import (  # noqa: E402
    GPUS,
    INTERVALS,
    MODELS,
    Model,
    Part,
    bytes_moved,
    delta2_flops,
    delta3_flops,
    gram_flops,
    packed_bytes,
    plan,
    snapshot_bytes,
)

from mcore_monitors.windows import Grid  # noqa: E402

#: layers, query heads, query groups, head dimension, hidden size
SIZES = ((4, 4, 4, 32, 128), (4, 8, 2, 64, 512), (2, 16, 16, 64, 1024), (2, 8, 8, 128, 2048))
WINDOW = 50


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
    from mcore_monitors.signals.update_measures import measures_of_grams
    from mcore_monitors.signals.update_spectra import gram_eigenvalues

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
    # every tenth sample looks for directions that persist as well: those are left out here
    taken = [t for i, t in enumerate(samples(70, 12)) if (7 + i) % 10]
    measured = sorted(taken)[len(taken) // 2]

    pair = torch.randn(max(1, 2**21 // (16 * d * hidden)), 2 * d, hidden, dtype=torch.float64)
    rate = 8 * d * d * hidden * len(pair) / _median_seconds(lambda: pair @ pair.mT)
    small = torch.randn(part.heads, 2 * d, 2 * d, dtype=torch.float64)
    small = small @ small.mT
    single = small[:, :d, :d].repeat(3, 1, 1)
    solver = _median_seconds(lambda: measures_of_grams(small.clone()))
    solver += _median_seconds(lambda: gram_eigenvalues(single.clone()))
    small_products = delta2_flops(part, part.heads) + delta3_flops(part, part.heads)
    gemm = gram_flops(part, part.heads, part.groups) + small_products
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
