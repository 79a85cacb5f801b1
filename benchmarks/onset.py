"""What a coherent part does to the update spectra, and from which strength on it is seen.

    python benchmarks/onset.py --json onset.json

One step moves W_q of a head by c·‖noise‖_F·u vᵀ + noise: a push of rank one whose unit vectors u
and v stay, and white noise drawn anew; c is the ratio of their Frobenius norms (of the noise: root
mean square, σ√(d D)). W_k likewise, with vectors of its own. Over n steps the push adds up to n and
the noise to √n, so the window's ratio is c√n. The table has the effective ranks of ΔW_q, Δ2 and Δ3
over a window against c√n, with what energies alone predict (`predicted`), then how often the spike
estimator fires on healthy windows and on faulty ones, and how often a persistent spike is reported
for updates of low rank with directions of their own at each sample (LoRA-like) and for a push that
stays. Draws are from the seeds given; the estimator's level was fixed from theory, not from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcore_monitors.signals.direction import direction_overlap, leading_directions
from mcore_monitors.signals.spectra import measures
from mcore_monitors.signals.spike import persistent_spike, spike
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_spectra import (
    UpdateSpectra,
    spectra_from_grams,
    update_spectra,
)

GRID = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
SHAPES = ((16, 64), (32, 128), (64, 512), (64, 1024), (128, 1024))
SAMPLES = 5  # windows in a row of the persistence check
WEIGHT, STEP = 0.02, 1e-6  # standard deviations of a weight and of one step's noise


class Window(NamedTuple):
    """Weights before a window, and the two parts of what a window adds to them."""

    weights: tuple[Tensor, Tensor]
    """W_q, W_k [H, d, D]."""
    noise: tuple[Tensor, Tensor]
    """Sum of the steps' noise."""
    push: tuple[Tensor, Tensor]
    """Coherent part at c√n = 1."""


def window(d: int, hidden: int, heads: int, steps: int, seed: int) -> Window:
    """Draw a window of ``steps`` steps for ``heads`` independent heads."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def unit(n: int) -> Tensor:
        return torch.nn.functional.normalize(draw(heads, n), dim=1)

    weights, noise, push = [], [], []
    for _ in range(2):
        weights.append(WEIGHT * draw(heads, d, hidden))
        total = torch.zeros(heads, d, hidden)
        for _ in range(steps):
            total += STEP * draw(heads, d, hidden)
        noise.append(total)
        size = STEP * math.sqrt(steps * d * hidden)
        push.append(size * unit(d)[:, :, None] * unit(hidden)[:, None, :])
    return Window(*(tuple(x) for x in (weights, noise, push)))


def spectra(drawn: Window, strength: float) -> UpdateSpectra:
    """Spectra of a window with a coherent part of c√n = ``strength``."""
    (wq, wk), (nq, nk), (pq, pk) = drawn
    return update_spectra(wq, wk, wq + nq + strength * pq, wk + nk + strength * pk)


def predicted(strength: float, d: int, healthy: dict[str, float]) -> dict[str, float]:
    """Effective ranks from energies alone: coherent directions beside a bulk of healthy rank.

    ΔW has one coherent direction of energy s² (the bulk's is 1). Δ2 has two of s²/2, from ΔW_q and
    ΔW_k. Δ3 = ΔW_qᵀ ΔW_k has the products of push with noise, s² each, and of push with push,
    s²·(u_q·u_k) with (u_q·u_k)² = 1/d on average: singular values (a ± √(a² + 4s²))/2, a = s²/√d.
    """
    square = strength**2
    a = square / math.sqrt(d)
    root = math.sqrt(a * a + 4 * square)
    coherent = {
        "query": [square],
        "delta2": [square / 2] * 2,
        "delta3": [((a + root) / 2) ** 2, ((a - root) / 2) ** 2],
    }
    ranks = {}
    for name, energies in coherent.items():
        total = 1 + sum(energies)
        entropy = (math.log(total) + math.log(healthy[name])) / total
        entropy -= sum(e / total * math.log(e / total) for e in energies if e > 0)
        ranks[name] = math.exp(entropy)
    return ranks


def ranks(d: int, hidden: int, heads: int, steps: int, seeds: range) -> list[dict[str, Any]]:
    """Effective ranks against c√n, over all heads and seeds."""
    drawn = [window(d, hidden, heads, steps, seed) for seed in seeds]
    rows: list[dict[str, Any]] = []
    for strength in GRID:
        runs = [spectra(one, strength) for one in drawn]
        row: dict[str, Any] = {"c_sqrt_n": strength}
        for name in ("query", "delta2", "delta3"):
            values = measures(torch.cat([getattr(run, name) for run in runs]))
            row[name] = values.effective_rank.mean().item()
            row[f"{name}_sd"] = values.effective_rank.std().item()
            row[f"{name}_stable"] = values.stable_rank.mean().item()
        found = spike(torch.cat([run.query for run in runs]), hidden)
        row["strength"] = found.strength.mean().item()
        row["detected"] = (found.outliers > 0).double().mean().item()
        healthy = {name: (rows[0] if rows else row)[name] for name in ("query", "delta2", "delta3")}
        row["predicted"] = predicted(strength, d, healthy)
        rows.append(row)
    return rows


def detection(draws: int, seed: int) -> list[dict[str, Any]]:
    """Share of windows with an outlying value: healthy, and with a push of c√n = 0.1 to 0.5."""
    rows = []
    for d, hidden in SHAPES:
        g = torch.Generator().manual_seed(seed)
        row: dict[str, Any] = {"d": d, "D": hidden, "draws": draws}
        for strength in (0.0, 0.1, 0.2, 0.3, 0.5):
            fired, done = 0, 0
            while done < draws:
                n = min(100, draws - done)
                x = torch.randn(n, d, hidden, generator=g)
                left = torch.nn.functional.normalize(torch.randn(n, d, 1, generator=g), dim=1)
                right = torch.nn.functional.normalize(torch.randn(n, 1, hidden, generator=g), dim=2)
                x = (x + strength * math.sqrt(d * hidden) * left * right).double()
                squared = torch.linalg.eigvalsh(x @ x.mT).flip(-1)
                fired += int((spike(squared, hidden).outliers > 0).sum())
                done += n
            row[f"fired_at_{strength}"] = fired / draws
        rows.append(row)
    return rows


def persistence(d: int, hidden: int, heads: int, seeds: range) -> list[dict[str, Any]]:
    """Share of heads with outlying values at all samples, and with a persistent spike."""
    rows = []
    for kind, rank in (
        ("noise", 0),
        ("low rank", 1),
        ("low rank", 4),
        ("low rank", 16),
        ("push", 1),
    ):
        outlying, persistent, overlap = [], [], []
        for seed in seeds:
            first = window(d, hidden, heads, 1, 10_000 + seed)
            wq, wk = first.weights
            counts, directions = [], []
            for sample in range(SAMPLES):
                g = torch.Generator().manual_seed(20_000 + 100 * seed + sample)
                step = []
                for side in range(2):
                    move = STEP * torch.randn(heads, d, hidden, generator=g)
                    if kind == "low rank":  # ten times the noise's norm, in new directions
                        left = torch.randn(heads, d, rank, generator=g)
                        right = torch.randn(heads, rank, hidden, generator=g)
                        move = move + 10 * STEP / math.sqrt(rank) * left @ right
                    elif kind == "push":
                        move = move + 0.5 * first.push[side]
                    step.append(move)
                new = wq + step[0], wk + step[1]
                grams = update_grams(wq, wk, *new)
                counts.append(spike(spectra_from_grams(grams).query, hidden).outliers)
                directions.append(leading_directions(grams, wq, wk, *new))
                wq, wk = new
            planes, number = torch.stack(directions), torch.stack(counts)
            overlaps = direction_overlap(planes[1:], planes[:-1])
            outlying.append((number >= 1).all(0))
            persistent.append(persistent_spike(number, overlaps))
            overlap.append(overlaps.flatten())
        rows.append(
            {
                "update": kind,
                "rank": rank,
                "heads": heads * len(seeds),
                "outlying": torch.cat(outlying).double().mean().item(),
                "persistent": torch.cat(persistent).double().mean().item(),
                "median_overlap": torch.cat(overlap).median().item(),
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    """Print the three tables."""
    print("\neffective rank over a window (predicted), mean over heads and seeds")
    print(f"{'c√n':>6}{'ΔW_q':>18}{'Δ2':>18}{'Δ3':>18}{'ĉ√n':>8}{'spikes':>8}")
    for row in result["ranks"]:
        cells = [
            f"{row[n]:8.2f} ({row['predicted'][n]:.2f})" for n in ("query", "delta2", "delta3")
        ]
        print(f"{row['c_sqrt_n']:6.2f}" + "".join(f"{c:>18}" for c in cells), end="")
        print(f"{row['strength']:8.3f}{row['detected']:8.1%}")
    print("\nshare of windows with an outlying value, against c√n")
    print(f"{'d':>4}{'D':>6}{'healthy':>10}{'0.1':>9}{'0.2':>9}{'0.3':>9}{'0.5':>9}")
    for row in result["detection"]:
        fired = [row[f"fired_at_{s}"] for s in (0.0, 0.1, 0.2, 0.3, 0.5)]
        print(f"{row['d']:4}{row['D']:6}{fired[0]:10.2%}", "".join(f"{f:9.1%}" for f in fired[1:]))
    print(f"\nover {SAMPLES} samples: outlying at all of them, and reported as persistent")
    for row in result["persistence"]:
        name = f"{row['update']} {row['rank'] or ''}"
        print(f"{name:12}{row['outlying']:8.1%}{row['persistent']:8.1%}", end="")
        print(f"  median overlap {row['median_overlap']:.2f}, {row['heads']} heads")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/onset.py --seeds 4 --json onset.json",
    )
    parser.add_argument("--seeds", type=int, default=8, help="windows of the table (default 8)")
    parser.add_argument("--heads", type=int, default=8, help="heads a window (default 8)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100, help="n (default 100)")
    parser.add_argument("--draws", type=int, default=1000, help="of the spike's check")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    a = parser.parse_args()
    seeds = range(a.seeds)
    result = {
        "d": a.head_dim,
        "D": a.hidden,
        "heads": a.heads,
        "steps": a.steps,
        "ranks": ranks(a.head_dim, a.hidden, a.heads, a.steps, seeds),
        "detection": detection(a.draws, seed=5000),
        "persistence": persistence(a.head_dim, a.hidden, a.heads, seeds),
        "made_by": {
            "command": " ".join(["python", "benchmarks/onset.py", *sys.argv[1:]]),
            "seed": f"0 to {a.seeds - 1}; 5000 for the spike's check",
            "date": datetime.now(UTC).date().isoformat(),
            "cores": os.cpu_count(),
            "versions": {n: version(n) for n in ("mcore-monitors", "torch")},
        },
    }
    show(result)
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
