"""What the precision of the Gram matrices and of the eigenproblem costs the update spectra.

    python benchmarks/spectra_accuracy.py --json spectra_accuracy.json

Largest relative error of effective rank, over heads and the four matrices, against the float64 QR
route on the same float32 weights. Precisions of the Gram product: float64; float32; float32 in
blocks of 128 columns added up in float64; TF32 (inputs rounded to 11 significant bits, sums in
float32), as a training that has switched it on would get. `float32 eigen`: Gram matrices in
float64, eigenvalues in float32. Times are CPU milliseconds of the Gram product of one call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_monitors.signals.spectra import effective_rank
from mcore_monitors.signals.update_grams import UpdateGrams, WholeGram
from mcore_monitors.signals.update_spectra import UpdateSpectra, spectra_from_grams
from mcore_monitors.signals.update_spectra_qr import update_spectra_qr

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
UPDATES = ("noise", "rank 1 + noise", "rank 4", "rank 1", "cancelling")


def make(d: int, hidden: int, heads: int, update: str, ratio: float, decay: float) -> Weights:
    """Float32 weights; singular values of W fall by 10^decay, ‖ΔW‖/‖W‖ = ratio."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    old = []
    for _ in range(2):
        u, _, v = torch.linalg.svd(draw(heads, d, hidden), full_matrices=False)
        old.append((u * torch.logspace(0, -decay, d, dtype=torch.float64)) @ v)
    if update == "cancelling":  # turns the inner basis of the head: Δ2 is rounding alone
        m = draw(heads, d, d)
        moves = [m @ old[0], -m.mT @ old[1]]
    else:
        rank = {"noise": 0, "rank 4": 4}.get(update, 1)
        moves = [draw(heads, d, rank) @ draw(heads, rank, hidden) for _ in old]
        if "noise" in update:
            moves = [m + draw(heads, d, hidden) for m in moves]
    new = [w + m * (ratio * w.norm() / m.norm()) for w, m in zip(old, moves, strict=True)]
    return tuple(w.float() for w in (*old, *new))


def tf32(x: Tensor) -> Tensor:
    """Float32 rounded to TF32's 11 significant bits, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def in_float64(x: Tensor) -> Tensor:
    """X Xᵀ."""
    return x @ x.mT


def in_float32(x: Tensor) -> Tensor:
    """X Xᵀ in float32."""
    x = x.float()
    return (x @ x.mT).double()


def in_blocks(x: Tensor) -> Tensor:
    """X Xᵀ in float32 over 128 columns at a time, added up in float64."""
    total = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=torch.float64)
    for block in x.float().split(128, dim=2):
        total += block @ block.mT
    return total


def in_tf32(x: Tensor) -> Tensor:
    """X Xᵀ as a tensor core computes it."""
    x = tf32(x.float())
    return (x @ x.mT).double()


def grams(w: Weights, product: Callable[[Tensor], Tensor]) -> tuple[UpdateGrams, float]:
    """Gram matrices by a product, and the CPU seconds of the product."""
    wq, wk, wq_new, wk_new = (x.double() for x in w)
    a, b = torch.cat([wq_new - wq, wq], 1), torch.cat([wk_new - wk, wk], 1)
    start = time.process_time()
    made = product(a), product(b)
    spent = time.process_time() - start
    return UpdateGrams(*map(WholeGram, made)), spent


def float32_eigenvalues(pair: UpdateGrams) -> UpdateSpectra:
    """The spectra, with every eigenproblem in float32."""
    solve = torch.linalg.eigvalsh

    def narrow(x: Tensor, **triangle: str) -> Tensor:
        return solve(x.float(), **triangle).double()

    torch.linalg.eigvalsh = narrow
    try:
        return spectra_from_grams(pair)
    finally:
        torch.linalg.eigvalsh = solve


def error(got: UpdateSpectra, want: UpdateSpectra) -> float:
    """Largest relative error of effective rank over matrices and heads."""
    pairs = zip(got, want, strict=True)
    ranks = [(effective_rank(a), effective_rank(b)) for a, b in pairs]
    return max(((a - b).abs() / b).nan_to_num(torch.inf).max().item() for a, b in ranks)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/spectra_accuracy.py --hidden 512",
    )
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    a = parser.parse_args()
    torch.set_num_threads(1)
    products = {
        "float64": (in_float64, torch.float64),
        "float32": (in_float32, torch.float32),
        "float32 in blocks": (in_blocks, torch.float32),
        "TF32": (in_tf32, torch.float32),
    }
    names = [*products, "float32 eigen"]
    print(f"{'update':16}{'‖ΔW‖/‖W‖':>10}{'decay':>6}" + "".join(f"{n:>19}" for n in names))
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = dict.fromkeys(names, 0.0)
    for update in UPDATES:
        for ratio in (1e-3, 1e-5):
            for decay in (0.0, 3.0):
                w = make(a.head_dim, a.hidden, a.heads, update, ratio, decay)
                want = update_spectra_qr(*w)
                row: dict[str, Any] = {"update": update, "ratio": ratio, "decay": decay}
                for name, (product, dtype) in products.items():
                    pair, spent = grams(w, product)
                    seconds[name] += spent
                    row[name] = error(spectra_from_grams(pair, gram_dtype=dtype), want)
                pair, _ = grams(w, in_float64)
                row["float32 eigen"] = error(float32_eigenvalues(pair), want)
                rows.append(row)
                print(f"{update:16}{ratio:10.0e}{decay:6.0f}", end="")
                print("".join(f"{row[n]:19.0e}" for n in names), flush=True)
    milliseconds = {n: 1e3 * seconds[n] / len(rows) for n in products}
    print(f"{'CPU ms of the Gram product':32}", end="")
    print("".join(f"{m:19.2f}" for m in milliseconds.values()))
    if a.json:
        result = {
            "d": a.head_dim,
            "D": a.hidden,
            "heads": a.heads,
            "rows": rows,
            "gram_ms": milliseconds,
            "made_by": {
                "command": " ".join(["python", "benchmarks/spectra_accuracy.py", *sys.argv[1:]]),
                "seed": 0,
                "date": datetime.now(UTC).date().isoformat(),
                "cores": f"1 of {os.cpu_count()}",
                "versions": {n: version(n) for n in ("mcore-monitors", "torch")},
            },
        }
        a.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
