"""Does Koopman spectral shaping keep a training from diverging?

    nice -n 15 python benchmarks/koopman_kss.py --json kss.json

No-Norm transformers on associative recall (``koopman_study/``: width 128, 4 layers, no norm
anywhere, AdamW, warm-up 100) at learning rates .005 to .01, the same seeds in every arm: no remedy,
clipping at 0.5 and 1.0, shaping. A run ends at step 250 or where it diverges by the paper's label
(loss above 50 or gradient norm above 500; under clipping the norm before it). Rows are appended to
``benchmarks/results/koopman_kss.jsonl`` as they are made; the next start goes on. 10 to 40 seconds
a run on one core.

``--part search`` makes the runs that the settings of the shaping were chosen by, on seeds of their
own; ``--part stable`` finds the largest learning rate at which no seed diverges, without and with
shaping; ``--part overhead`` the share of a step's CPU time, on and off in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from conservation_common import made_by  # noqa: E402
from koopman_study import task  # noqa: E402
from koopman_study.model import Model, Sizes  # noqa: E402
from koopman_study.one_run import Run, carry_out  # noqa: E402

from mcore_monitors.config import KssConfig  # noqa: E402
from mcore_monitors.hosts.kss import Shaping  # noqa: E402
from mcore_monitors.monitors.base import StepState  # noqa: E402

ROWS = ROOT / "benchmarks" / "results" / "koopman_kss.jsonl"
#: α of the paper; β, which it does not give, and γ within its range
PAPER = KssConfig(alpha=0.15, beta=1.0, gamma=0.4)
#: what did most in the search
CHOSEN = KssConfig(alpha=1.5, beta=1.0, gamma=0.4, interval=5)
STEPS, BATCH, LAYERS, WIDTH = 250, 8, 4, 128
RATES = (0.005, 0.0075, 0.01)
SEEDS = range(500, 508)
#: arm → (clip, shaping)
ARMS: dict[str, tuple[float | None, KssConfig | None]] = {
    "none": (None, None),
    "clip 0.5": (0.5, None),
    "clip 1.0": (1.0, None),
    "KSS": (None, CHOSEN),
}
#: no seed of these is reported in an arm
SEARCH_SEEDS = range(9000, 9003)
SEARCH_RATE = 0.005
SEARCH = (
    None,
    *(replace(PAPER, beta=beta) for beta in (1.0, 100.0)),
    *(replace(PAPER, alpha=alpha) for alpha in (1.5, 15.0)),
    replace(PAPER, alpha=1.5, beta=100.0),
    replace(PAPER, alpha=1.5, interval=5),
)
STABLE_RATES = (0.001, 0.002, 0.003, 0.004)
STABLE_SEEDS = range(500, 503)


def run_of(rate: float, seed: int, clip: float | None = None) -> Run:
    """One No-Norm training."""
    return Run(
        architecture="no_norm", layers=LAYERS, learning_rate=rate, init_scale=1.0, seed=seed,
        steps=STEPS, batch=BATCH, clip=clip,
    )  # fmt: skip


def wanted(part: str) -> list[tuple[str, Run, KssConfig | None]]:
    """(name, run, shaping); all arms of a seed one after another, so that a part is balanced."""
    if part == "search":
        return [
            ("search", run_of(SEARCH_RATE, seed), kss) for seed in SEARCH_SEEDS for kss in SEARCH
        ]
    if part == "stable":
        return [
            (f"stable {name}", run_of(rate, seed), kss)
            for seed in STABLE_SEEDS
            for rate in STABLE_RATES
            for name, kss in (("none", None), ("KSS", CHOSEN))
        ]
    return [
        (name, run_of(rate, seed, clip), kss)
        for seed in SEEDS
        for rate in RATES
        for name, (clip, kss) in ARMS.items()
    ]


def key_of(run: Run, kss: KssConfig | None) -> str:
    """What makes two runs the same, whatever they are called."""
    return json.dumps([run.key, kss and asdict(kss)], sort_keys=True)


def rows(path: Path) -> list[dict[str, Any]]:
    """Finished runs; a last line that was cut off is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _one(name: str, run: Run, kss: KssConfig | None) -> dict[str, Any]:
    """The row of one run, made on one core."""
    torch.set_num_threads(1)
    made = carry_out(run, kss, profiled=False)
    return {"arm": name, "of": key_of(run, kss), "kss": kss and asdict(kss), **made}


def make(part: str, path: Path, at_most: int | None, workers: int) -> None:
    """Make the runs of a part that are missing."""
    done = {(row["arm"], row["of"]) for row in rows(path)}
    todo = [
        (name, run, kss) for name, run, kss in wanted(part) if (name, key_of(run, kss)) not in done
    ]
    todo = todo[:at_most]
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(_one, *one) for one in todo]
        for future in tqdm(as_completed(futures), total=len(todo), unit="run"):
            with path.open("a") as out:
                out.write(json.dumps(future.result()) + "\n")


def share(diverged: list[bool]) -> dict[str, Any]:
    """Count with its 95% interval (Clopper–Pearson)."""
    found = binomtest(sum(diverged), len(diverged)).proportion_ci(0.95, method="exact")
    return {
        "runs": len(diverged),
        "diverged": sum(diverged),
        "low": float(found.low),
        "high": float(found.high),
    }


def overhead(rounds: int = 12) -> dict[str, Any]:
    """CPU time of shaped over plain training, an interval of each in turn, on one model each."""
    times: dict[bool, list[float]] = {True: [], False: []}
    trainings = {on: _Training(CHOSEN if on else None) for on in times}
    for at in range(rounds + 2):
        for on, training in trainings.items():
            start = time.process_time()
            training.block(at * CHOSEN.interval, CHOSEN.interval)
            if at >= 2:
                times[on].append(time.process_time() - start)
    ratios = [a / b - 1 for a, b in zip(times[True], times[False], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "share": statistics.median(times[True]) / statistics.median(times[False]) - 1,
        "quartiles_of_rounds": [quarters[0], quarters[2]],
        "ms_a_step": 1000 * statistics.median(times[False]) / CHOSEN.interval,
        "rounds": rounds,
        "batch": 16,
    }


class _Training:
    """A Pre-LN model of the study at a learning rate where it trains."""

    def __init__(self, kss: KssConfig | None) -> None:
        torch.manual_seed(0)
        self.generator = torch.Generator().manual_seed(1)
        self.model = Model(Sizes(architecture="pre_ln", layers=LAYERS, hidden=WIDTH))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state, self.shaping = StepState(), None
        if kss is not None:
            device = torch.device("cpu")
            self.shaping = Shaping(kss, range(LAYERS), self.state, device, scale=lambda _: 1.0)
            for layer, block in enumerate(self.model.blocks):
                self.shaping.attach(layer, block, WIDTH)

    def block(self, first: int, steps: int) -> None:
        for step in range(first + 1, first + steps + 1):
            self.state.iteration = step
            tokens, answers = task.batch(16, self.generator)
            loss = F.cross_entropy(self.model(tokens), answers)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.shaping is not None:
                self.shaping.on_step(step)


def largest_stable(made: list[dict[str, Any]]) -> dict[str, float | None]:
    """The largest rate up to which no seed diverged, without and with shaping."""
    found = {}
    for name in ("none", "KSS"):
        mine = [r for r in made if r["arm"] in (name, f"stable {name}")]
        stable = None
        for rate in sorted({r["learning_rate"] for r in mine}):
            if any(r["diverged_at"] for r in mine if r["learning_rate"] == rate):
                break
            stable = rate
        found[name] = stable
    return found


def summary(made: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of each arm over all rates and at each, the search, the largest stable rate."""
    arms = {}
    for name in ARMS:
        mine = [r for r in made if r["arm"] == name]
        if not mine:
            continue
        arms[name] = share([r["diverged_at"] is not None for r in mine]) | {
            "median_step": statistics.median(r["diverged_at"] or STEPS + 1 for r in mine),
            "by_rate": {
                str(rate): share([r["diverged_at"] is not None for r in here])
                for rate in RATES
                if (here := [r for r in mine if r["learning_rate"] == rate])
            },
        }
    search: dict[str, list[int | None]] = {}
    for row in made:
        if row["arm"] == "search":
            search.setdefault(json.dumps(row["kss"]), []).append(row["diverged_at"])
    return {"kss": arms, "kss_search": search, "max_stable_lr": largest_stable(made)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: nice -n 15 python benchmarks/koopman_kss.py --part arms --at-most 20",
    )
    parts = ("arms", "search", "stable", "overhead", "summary")
    parser.add_argument("--part", choices=parts, default="arms")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the raw table")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--at-most", type=int, help="stop after this many runs")
    parser.add_argument("--json", type=Path, help="write, or add, the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        result = json.loads(arguments.json.read_text())
    if arguments.part == "overhead":
        result["kss_overhead"] = overhead()
        print(result["kss_overhead"])
    elif arguments.part != "summary":
        make(arguments.part, arguments.rows, arguments.at_most, arguments.workers)
    made = rows(arguments.rows)
    result |= summary(made) | {"made_by": made_by(sorted({row["seed"] for row in made}))}
    for name, arm in result["kss"].items():
        print(
            f"{name:18} {arm['diverged']:3} of {arm['runs']:3} diverged "
            f"[{arm['low']:.2f}, {arm['high']:.2f}], median step {arm['median_step']:.0f}"
        )
    for kss, ends in result["kss_search"].items():
        print(kss, ends)
    print("largest stable learning rate", result["max_stable_lr"])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
