"""What a Koopman profile costs: time and memory of one layer against hidden size and tokens.

    python benchmarks/koopman_cost.py --json koopman_cost.json

Random states before the layer, a random residual branch of a tenth of their size behind it; one
layer at a time, as a rank computes its layers. Each row runs in turn with all others, ``--rounds``
times. Times are CPU seconds of all threads and the least wall time; memory is what the process
grew by at most above the snapshots themselves (Linux only). What a run pays besides: copying the
tokens in the hooks and one reduction of (2 D + 1) N numbers a layer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mcore_monitors.signals.koopman import decompose, whiten

#: (hidden size, tokens, modes; None for all)
CASES = (
    (128, 2048, None),
    (256, 2048, None),
    (128, 2048, 32),
    (256, 2048, 32),
    (512, 2048, 32),
    (768, 1024, 32),
    (768, 2048, 32),
    (768, 4096, 32),
    (1024, 2048, 32),
    (2048, 2048, 32),
)


def _states(width: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    branch = torch.randn(width, width, generator=generator) / width**0.5
    return x, x + 0.1 * torch.tanh(x @ branch)


def timed(width: int, tokens: int, rank: int | None) -> tuple[float, float]:
    """(wall, CPU) seconds of one layer."""
    x, y = _states(width, tokens)
    cpu, wall = time.process_time(), time.perf_counter()
    decompose(*whiten(x, y), rank=rank)
    return time.perf_counter() - wall, time.process_time() - cpu


def _status(name: str) -> int:
    """A size out of Linux's own record of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name))


def memory(width: int, tokens: int, rank: int | None) -> int:
    """Bytes that this process grows by at most while it profiles one layer."""
    x, y = _states(width, tokens)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier rows gave back must not serve this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS:")
    decompose(*whiten(x, y), rank=rank)
    return _status("VmHWM:") - before


def made_by(threads: int) -> dict[str, Any]:
    """What a kept result has to say about its origin."""
    return {
        "command": " ".join(["python", "benchmarks/koopman_cost.py", *sys.argv[1:]]),
        "seed": 0,
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {name: version(name) for name in ("mcore-monitors", "torch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/koopman_cost.py --threads 2 --json koopman_cost.json",
    )
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--largest", type=int, default=2048, metavar="D", help="leave out wider cases"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if case[0] <= args.largest]
    timed(64, 256, 32)
    seconds: dict[tuple, list[tuple[float, float]]] = {case: [] for case in cases}
    turns = [case for _ in range(args.rounds) for case in cases]
    for case in tqdm(turns, unit="profile", disable=None):
        seconds[case].append(timed(*case))
    rows = []
    for case in cases:
        grew = memory(*case)
        width, tokens, rank = case
        rows.append(
            {
                "D": width,
                "N": tokens,
                "rank": rank or width,
                "seconds": round(min(wall for wall, _ in seconds[case]), 4),
                "cpu_seconds": round(statistics.median(cpu for _, cpu in seconds[case]), 4),
                "snapshot_bytes": 2 * tokens * width * 4,
                "extra_bytes": grew,
            }
        )
    heads = f"{'D':>5} {'N':>5} {'modes':>5} {'seconds':>8} {'CPU s':>7}"
    print(f"{heads} {'snapshots':>10} {'extra':>9}")
    for row in rows:
        print(
            f"{row['D']:>5} {row['N']:>5} {row['rank']:>5} {row['seconds']:>8.3f} "
            f"{row['cpu_seconds']:>7.3f} {row['snapshot_bytes'] / 2**20:>7.1f} MB "
            f"{row['extra_bytes'] / 2**20:>6.0f} MB"
        )
    if args.json is not None:
        made = made_by(args.threads)
        args.json.write_text(json.dumps({"rows": rows, "made_by": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
