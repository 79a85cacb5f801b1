"""What monitoring costs a training step: on, off and each monitor alone, interleaved in one run.

    python benchmarks/overhead.py --json overhead.json

Trains the demo's model with the real Megatron-core in two processes and changes, every interval of
ten steps, which monitors are on: none, all, attention updates, router, conservation residuals, and
round again. A block holds one sample, as a run at interval 10 does. The time of a mode is nine times
the median of its steps without a sample and once the median of its steps with one, over all its
blocks, and its share (time of the mode) / (time with none) − 1: a machine that slows down for a
while slows all modes alike, and a single hiccup moves no median. The 95% interval is from 1,000
bootstrap draws over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "benchmarks")]

from overhead_worker import MODES  # noqa: E402

INTERVAL = 10


def run(rounds: int, folder: Path) -> np.ndarray:
    """Train and return the seconds of every step [round, mode, step], two first rounds left out."""
    import text
    from demo_model import MEGATRON_ARGUMENTS

    cycle = INTERVAL * len(MODES)
    config = folder / "monitors.yaml"
    settings = {
        "run_dir": str(folder / "run"),
        "interval": INTERVAL,
        # snapshots are as old as one cycle, so a mode finds the one it took itself
        "monitors": {"attention_update": {"windows": [cycle]}},
        "console": False,
        "wandb": {"enabled": False},
    }
    config.write_text(yaml.safe_dump(settings))
    times = folder / "times.json"
    binaries = Path(sys.executable).parent
    command = [
        str(binaries / "deepspeed"), "--num_accelerators", "2", "--no_local_rank",
        "--master_port", "29477", str(ROOT / "benchmarks" / "overhead_worker.py"),
        *MEGATRON_ARGUMENTS,
        "--train-iters", str(cycle * (rounds + 2)),
        "--data-path", str(text.build(ROOT / "data" / "stdlib")),
        "--data-cache-path", str(folder / "cache"),
        "--mcore-monitors", str(config), "--mcore-monitors-cpu",
    ]  # fmt: skip
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MCORE_MONITORS_BENCHMARK": str(times),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    }
    log = folder / "log"
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
    if code:
        sys.exit(log.read_text()[-3000:])
    return np.array(json.loads(times.read_text())).reshape(-1, len(MODES), INTERVAL)[2:]


def block_time(steps: np.ndarray) -> np.ndarray:
    """Time of a block from steps [..., round, step]: sampled and other steps by their medians."""
    others = np.median(steps[..., :-1].reshape(*steps.shape[:-2], -1), axis=-1)
    return (INTERVAL - 1) * others + np.median(steps[..., -1], axis=-1)


def shares(steps: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of a step that each mode costs, with a 95% bootstrap interval over rounds."""
    draws = np.random.default_rng(0).integers(0, len(steps), (1000, len(steps)))
    off, drawn_off = block_time(steps[:, 0]), block_time(steps[:, 0][draws])
    result = {}
    for i, mode in enumerate(MODES):
        if mode == "off":
            continue
        ratios = block_time(steps[:, i][draws]) / drawn_off - 1
        result[f"share_{mode}"] = {
            "share": float(block_time(steps[:, i]) / off - 1),
            "low": float(np.quantile(ratios, 0.025)),
            "high": float(np.quantile(ratios, 0.975)),
        }
    return result


def made_by() -> dict[str, Any]:
    """What a kept result has to say about its origin."""
    return {
        "command": " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "seed": "Megatron's default, 1234",
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {n: version(n) for n in ("mcore-monitors", "megatron-core", "torch")},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/overhead.py --rounds 40 --json overhead.json",
    )
    parser.add_argument("--rounds", type=int, default=30, help="blocks measured of each mode")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = run(arguments.rounds, Path(folder))
    table = shares(steps)
    step = float(block_time(steps[:, 0]) / INTERVAL)
    print(f"\none step without monitors: {1000 * step:.1f} ms ({arguments.rounds} blocks a mode)\n")
    print(f"{'monitors':16}{'share of a step':>18}{'95% interval':>24}")
    for name, row in table.items():
        interval = f"{100 * row['low']:.2f}% to {100 * row['high']:.2f}%"
        print(f"{name.removeprefix('share_'):16}{100 * row['share']:17.2f}%{interval:>24}")
    if arguments.json:
        result = {name: row["share"] for name, row in table.items()}
        result |= {"shares_with_interval": table, "step_seconds": step}
        result["steps"] = {mode: steps[:, i].round(5).tolist() for i, mode in enumerate(MODES)}
        result |= {"made_by": made_by()}
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
