"""The replication study of residual Koopman profiling (arXiv 2602.22988).

    python benchmarks/koopman.py --workers 2

Trains 252 small transformers on associative recall from a profile at initialization to divergence
or step 300, and appends a row a run to ``benchmarks/results/koopman_runs.jsonl``. It may be stopped
at any time; the next start goes on with the runs that are missing. One run takes 3 to 60 seconds on
one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from koopman_study.grid import study  # noqa: E402
from koopman_study.one_run import Run, carry_out  # noqa: E402

ROWS = ROOT / "benchmarks" / "results" / "koopman_runs.jsonl"


def rows(path: Path) -> list[dict]:
    """The rows of finished runs; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _quiet(run: Run) -> dict:
    torch.set_num_threads(1)
    return carry_out(run)


def _append(path: Path, row: dict) -> None:
    with path.open("a") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the raw table")
    parser.add_argument("--at-most", type=int, help="stop after this many runs")
    arguments = parser.parse_args()
    done = {row["key"] for row in rows(arguments.rows)}
    todo = [run for run in study() if run.key not in done][: arguments.at_most]
    with ProcessPoolExecutor(arguments.workers) as pool:
        futures = [pool.submit(_quiet, run) for run in todo]
        for future in tqdm(as_completed(futures), total=len(todo), unit="run"):
            _append(arguments.rows, future.result())


if __name__ == "__main__":
    main()
