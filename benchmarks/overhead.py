"""What monitoring costs a training step: on, off and each monitor alone, interleaved in one run.

    python benchmarks/overhead.py --json overhead.json

Trains the demo's model with the real Megatron-core in two processes and changes, every interval of
ten steps, which monitors are on: none, all, attention updates, router, conservation residuals, and
round again. A block holds one sample, as a run at interval 10 does. A mode's share of a step is
(median block time of the mode) / (median block time with none) − 1, so that a machine that slows
down for a while slows all modes alike. The interval between medians is from 1,000 bootstrap draws.
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


def run(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Train and return the block times in seconds of each mode, the first two rounds left out."""
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
    steps = np.array(json.loads(times.read_text())).reshape(-1, len(MODES), INTERVAL)
    blocks = steps[2:].sum(axis=2)
    return {mode: blocks[:, i].tolist() for i, mode in enumerate(MODES)}


def shares(blocks: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Share of a step that each mode costs, with a 95% bootstrap interval."""
    random = np.random.default_rng(0)
    off = np.array(blocks["off"])
    result = {}
    for mode, times in blocks.items():
        if mode == "off":
            continue
        on = np.array(times)
        draws = random.integers(0, len(off), (1000, len(off)))
        ratios = np.median(on[draws], axis=1) / np.median(off[draws], axis=1) - 1
        result[f"share_{mode}"] = {
            "share": float(np.median(on) / np.median(off) - 1),
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
        blocks = run(arguments.rounds, Path(folder))
    table = shares(blocks)
    step = float(np.median(blocks["off"]) / INTERVAL)
    print(f"\none step without monitors: {1000 * step:.1f} ms ({arguments.rounds} blocks a mode)\n")
    print(f"{'monitors':16}{'share of a step':>18}{'95% interval':>24}")
    for name, row in table.items():
        interval = f"{100 * row['low']:.2f}% to {100 * row['high']:.2f}%"
        print(f"{name.removeprefix('share_'):16}{100 * row['share']:17.2f}%{interval:>24}")
    if arguments.json:
        result = {name: row["share"] for name, row in table.items()}
        result |= {"shares_with_interval": table, "step_seconds": step, "blocks": blocks}
        result |= {"made_by": made_by()}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
