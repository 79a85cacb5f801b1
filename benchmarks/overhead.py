"""What monitoring costs a training step: on, off and each monitor alone, interleaved in one run.

    python benchmarks/overhead.py --json overhead.json

Trains the demo's model with the real Megatron-core in two processes and changes, every interval of
ten steps, which monitors are on: none, all, each alone, and round again, with their default
settings. A block holds one sample, as a run at interval 10 does. The time of a mode is nine times
the median of its steps without a sample and once that of its steps with one, over all its blocks,
and its share (time of the mode) / (time with none) − 1: a machine that slows down for a while slows
all modes alike, and a single hiccup moves no median. Every tenth sample of the attention updates
compares two windows, tells all of them and costs more: the two kinds have a median each, weighted 9
to 1.

What no rule judges is looked at in some samples only (``monitors.*.every``), so the cost of a
sample inside of the monitors is the mean over all of them; it takes a multiple of twenty rounds for
every turn to come equally often.

A difference of whole steps can't tell 0.3% from nothing within minutes. So the headline shares are
of the CPU time that was spent inside of the monitors' hooks, of their samples and, for all of them,
of the whole call at the end of a step (reducing, judging and writing too), over that of the blocks
without monitors. The difference of whole steps, in CPU and in wall time, stands beside it: it would
show a cost that lies outside of our code. 95% intervals are from 1,000 bootstrap draws over rounds.

Between blocks, outside of the timed steps, the attention updates are also measured shared over the
two data-parallel ranks and not shared, on the same live model.
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

from overhead_worker import LEFT_OUT, MODES, SEEN  # noqa: E402

from mcore_monitors.windows import SELDOM  # noqa: E402

INTERVAL = 10
#: samples after which what the attention updates compare comes round; rounds are a multiple of it
_TURNS = 2 * SELDOM
#: names in the results where they are not those of the settings
KEYS = {"attention_update": "attention"}


def run(rounds: int, folder: Path) -> tuple[np.ndarray, list[dict[str, float]], dict[str, Any]]:
    """Train; the first two rounds are left out.

    Returns:
        Seconds of every step [round, mode, step, (wall, CPU)], seconds inside of each monitor a
        block of mode ``all``, and what was measured of sharing.
    """
    import text
    from demo_model import MEGATRON_ARGUMENTS

    cycle = INTERVAL * len(MODES)
    config = folder / "monitors.yaml"
    settings = {
        "run_dir": str(folder / "run"),
        "interval": INTERVAL,
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
        "--train-iters", str(cycle * (rounds + LEFT_OUT)),
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
    result = json.loads(times.read_text())
    steps = np.array(result["steps"]).reshape(-1, len(MODES), INTERVAL, 2)
    inside = result["inside"][list(MODES).index("all") :: len(MODES)]
    return steps[LEFT_OUT:], inside[LEFT_OUT:], result["replicas"]


def full_samples(rounds: int) -> np.ndarray:
    """[rounds] bool: the rounds in whose samples another window is compared and all is told."""
    return (np.arange(rounds) + LEFT_OUT + SEEN + 1) % SELDOM == 0


def block_time(steps: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Time of a block from steps [..., round, step]: sampled and other steps by their medians.

    Args:
        full: [round], of :func:`full_samples`.
    """
    others = np.median(steps[..., :-1].reshape(*steps.shape[:-2], -1), axis=-1)
    usual = np.median(steps[..., ~full, -1], axis=-1)
    all_windows = np.median(steps[..., full, -1], axis=-1)
    return (INTERVAL - 1) * others + (1 - 1 / SELDOM) * usual + all_windows / SELDOM


def redraw(full: np.ndarray, draws: int) -> np.ndarray:
    """[draws, rounds] rounds drawn with replacement, each by one of its own kind."""
    generator = np.random.default_rng(0)
    drawn = np.empty((draws, len(full)), dtype=int)
    for kind in (full, ~full):
        drawn[:, kind] = generator.choice(np.flatnonzero(kind), (draws, kind.sum()))
    return drawn


def shares(steps: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of a step that each mode costs, with a 95% bootstrap interval over rounds."""
    full = full_samples(len(steps))
    drawn = redraw(full, 1000)
    off, drawn_off = block_time(steps[:, 0], full), block_time(steps[:, 0][drawn], full)
    result = {}
    for i, mode in enumerate(MODES):
        if mode == "off":
            continue
        ratios = block_time(steps[:, i][drawn], full) / drawn_off - 1
        result[f"share_{KEYS.get(mode, mode)}"] = {
            "share": float(block_time(steps[:, i], full) / off - 1),
            "low": float(np.quantile(ratios, 0.025)),
            "high": float(np.quantile(ratios, 0.975)),
        }
    return result


def inside_shares(
    inside: list[dict[str, float]], steps: np.ndarray
) -> dict[str, dict[str, float]]:
    """Share of the CPU time of a step that is spent inside of each monitor, and of everything.

    Args:
        inside: seconds a block, of mode ``all``.
        steps: CPU seconds [round, mode, step].
    """
    full = full_samples(len(steps))
    drawn = redraw(full, 1000)
    off, drawn_off = block_time(steps[:, 0], full), block_time(steps[:, 0][drawn], full)

    result = {}
    columns = {name: np.array([block[name] for block in inside]) for name in inside[0]}
    # reducing, judging and writing
    columns["rest"] = 2 * columns["all"] - sum(columns.values())
    for name, seconds in columns.items():
        ratios = seconds[drawn].mean(-1) / drawn_off
        result[f"share_{KEYS.get(name, name)}"] = {
            "share": float(seconds.mean() / off),
            "low": float(np.quantile(ratios, 0.025)),
            "high": float(np.quantile(ratios, 0.975)),
            "milliseconds_a_sample": float(1000 * seconds.mean()),
        }
    return result


def replica_ratios(measured: dict[str, Any]) -> dict[str, float]:
    """Time of a sample and bytes of the snapshots of one of two replicas over one rank alone."""
    seconds = {name: np.array(values) for name, values in measured["seconds"].items()}
    # a median for each turn of what a sample compares, then their mean
    times = {
        name: float(np.mean([np.median(v[turn::_TURNS]) for turn in range(_TURNS)]))
        for name, v in seconds.items()
    }
    return {
        "replica_time_ratio": float(times["shared"] / times["alone"]),
        "replica_bytes_ratio": measured["bytes"]["shared"] / measured["bytes"]["alone"],
        "sample_cpu_seconds_shared": float(times["shared"]),
        "sample_cpu_seconds_alone": float(times["alone"]),
    }


def made_by() -> dict[str, Any]:
    """What a kept result has to say about its origin."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
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
    parser.add_argument(
        "--rounds", type=int, default=_TURNS, help=f"blocks of each mode, a multiple of {_TURNS}"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.rounds % _TURNS:
        parser.error(f"--rounds: {arguments.rounds} cannot be used; allowed: multiples of {_TURNS}")
    with tempfile.TemporaryDirectory() as folder:
        steps, inside, replicas = run(arguments.rounds, Path(folder))
    ratios = replica_ratios(replicas)
    tables, seconds = {"inside": inside_shares(inside, steps[..., 1])}, {}
    for clock, column in (("wall", 0), ("cpu", 1)):
        one = steps[..., column]
        tables[clock] = shares(one)
        seconds[clock] = float(block_time(one[:, 0], full_samples(len(one))) / INTERVAL)
    print(
        f"\none step without monitors: {1000 * seconds['cpu']:.1f} ms of CPU time, "
        f"{1000 * seconds['wall']:.1f} ms in all ({arguments.rounds} blocks a mode)\n"
    )
    titles = {"inside": "inside the monitors", "cpu": "CPU time on/off", "wall": "wall time on/off"}
    print(f"{'monitors':20}{'ms a sample':>12}" + "".join(f"{t:>28}" for t in titles.values()))
    for name, measured in tables["inside"].items():
        line = f"{name.removeprefix('share_'):20}{measured['milliseconds_a_sample']:12.2f}"
        for kind in titles:
            if name not in tables[kind]:
                continue
            row = tables[kind][name]
            shown = f"{100 * row['share']:.2f}% ({100 * row['low']:.2f} to {100 * row['high']:.2f})"
            line += f"{shown:>28}"
        print(line)
    print(
        f"\nattention updates shared over 2 replicas: {ratios['replica_time_ratio']:.2f} of the "
        f"CPU time and {ratios['replica_bytes_ratio']:.2f} of the snapshot bytes of one rank alone "
        f"({1000 * ratios['sample_cpu_seconds_shared']:.1f} against "
        f"{1000 * ratios['sample_cpu_seconds_alone']:.1f} ms a sample)"
    )
    if arguments.json:
        result = {name: row["share"] for name, row in tables["inside"].items()}
        result |= ratios | {"shares_with_interval": tables, "step_seconds": seconds}
        result["inside_seconds"] = inside
        result["cpu_steps"] = {
            mode: steps[:, i, :, 1].round(5).tolist() for i, mode in enumerate(MODES)
        }
        result |= {"made_by": made_by()}
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
