"""Does looking closely at what is dubious make healthy kernels alarm more often?

    python benchmarks/conservation_looks.py --json conservation_looks.json

The bound on a biased key shift is for a number of sequences that is fixed beforehand. A run
chooses: a place is looked at in every other sample, and in every one as long as its evidence is
over half its limit. Here thousands of layers of healthy kernels (independent residuals with
symmetric signs, evenly spread or with the heavy tails of Student's t with three degrees of freedom;
four heads, four sequences a look) are watched both ways, and it is counted how often the evidence
over the last 1, 3 or 10 samples passes a level. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from conservation_common import made_by  # noqa: E402

from mcore_monitors.monitors.conservation.evidence import WINDOWS  # noqa: E402
from mcore_monitors.monitors.conservation.turns import stride_of  # noqa: E402
from mcore_monitors.signals.conservation import direction_layer_log_p  # noqa: E402

HEADS, SEQUENCES, WARM_UP = 4, 4, 20
NOISE = ("even", "t3")
LEVELS = (1e-1, 1e-2, 1e-3)


def draw(noise: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Residuals of healthy kernels."""
    return random.uniform(-1, 1, shape) if noise == "even" else random.standard_t(3, shape)


def watch(
    noise: str, level: float, closely: bool, layers: int, samples: int, seed: int
) -> dict[str, Any]:
    """Shares of looks with evidence beyond a level, and of samples at which a layer is dubious."""
    random, stride = np.random.default_rng(seed), stride_of("attention")
    kept = np.zeros((max(WINDOWS), layers, HEADS, 4))
    dubious, beyond, looks, close = np.zeros(layers, dtype=bool), 0, 0, 0
    for sample in range(samples + WARM_UP):
        due = dubious | (sample % stride == 0)
        r = draw(noise, (layers, HEADS, SEQUENCES), random)
        sums = r.sum(-1), np.abs(r).sum(-1), np.square(r).sum(-1), np.full(r.shape[:2], SEQUENCES)
        kept[1:] = kept[:-1].copy()
        kept[0] = np.stack(sums, -1) * due[:, None, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_p = [direction_layer_log_p(kept[:window].sum(0)) for window in WINDOWS]
        evidence = -np.fmin.reduce([*log_p, np.zeros(layers)])
        if sample >= WARM_UP:
            beyond += int((due & (evidence >= -math.log(level))).sum())
            looks, close = looks + int(due.sum()), close + int(dubious.sum())
        if closely:
            dubious = np.where(due, evidence > -math.log(level) / 2, dubious)
    return {
        "noise": noise, "level": level, "closely": closely, "looks": looks, "beyond": beyond,
        "share_beyond": beyond / looks, "share_dubious": close / (layers * samples),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/conservation_looks.py --json conservation_looks.json",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--layers", type=int, default=4000, help="healthy layers")
    parser.add_argument("--samples", type=int, default=240, help="samples of each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    cases = [(n, level, c) for n in NOISE for level in LEVELS for c in (False, True)]
    sizes = arguments.layers, arguments.samples, arguments.seed
    rows = [watch(*case, *sizes) for case in tqdm(cases, desc="healthy layers", leave=False)]
    print("noise  level   looks by turns, beyond   closely, beyond   samples looked at closely")
    for turns, closely in zip(rows[::2], rows[1::2], strict=True):
        print(
            f"{turns['noise']:6} {turns['level']:<7g} {turns['share_beyond']:22.1e} "
            f"{closely['share_beyond']:17.1e} {closely['share_dubious']:27.1%}"
        )
    if arguments.json:
        result = {"rows": rows, "made_by": made_by(seed=[arguments.seed])}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
