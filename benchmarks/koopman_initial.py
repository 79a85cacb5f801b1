"""Profiles at initialization of the six architectures, beside table 1 of arXiv 2602.22988.

    python benchmarks/koopman_initial.py --json benchmarks/results/koopman_initial.json

The study's models (width 128, 4 layers, 4 heads, weights and embeddings normal with standard
deviation 0.02) on 32 sequences of 64 random tokens: all modes, no residual filter, mean over
layers, then mean and standard deviation over seeds. Under a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from conservation_common import made_by  # noqa: E402
from koopman_study.model import ARCHITECTURES, Model, Sizes  # noqa: E402
from koopman_study.one_run import PROFILE_SEQUENCES, profile_features  # noqa: E402
from koopman_study.task import LENGTH, VOCABULARY  # noqa: E402

#: what the paper prints: near-unit mass, super-unit mass, spectral radius
PAPER = {
    "pre_ln": (0.16, 0.54, 2.29),
    "rms_norm": (0.16, 0.54, 2.28),
    "post_ln": (0.66, 0.31, 7.48),
    "no_norm": (0.80, 0.19, 1.11),
}
FEATURES = ("near_unit", "super_unit", "spectral_radius")


def initial(architecture: str, seed: int) -> list[float]:
    """Means over layers of :data:`FEATURES`."""
    torch.manual_seed(seed)
    model = Model(Sizes(architecture=architecture))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (PROFILE_SEQUENCES, LENGTH), generator=generator)
    found = profile_features(model, tokens)
    return [found[f"{name}_mean"] for name in FEATURES]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/koopman_initial.py --seeds 5",
    )
    parser.add_argument("--seeds", type=int, default=5, help="models of each architecture")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'architecture':14}{'M≈1':>16}{'M>1':>16}{'ρ':>16}   paper")
    for architecture in ARCHITECTURES:
        over_seeds = zip(
            *(initial(architecture, seed) for seed in range(arguments.seeds)), strict=True
        )
        row = {"architecture": architecture, "paper": PAPER.get(architecture)}
        shown = ""
        for name, values in zip(FEATURES, over_seeds, strict=True):
            row[name], row[f"{name}_std"] = statistics.fmean(values), statistics.pstdev(values)
            shown += f"{row[name]:9.3f} ±{row[f'{name}_std']:5.3f}"
        rows.append(row)
        print(f"{architecture:14}{shown}   {row['paper'] or '–'}", flush=True)
    if arguments.json:
        made = made_by(list(range(arguments.seeds)))
        arguments.json.write_text(json.dumps({"rows": rows, "made_by": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
