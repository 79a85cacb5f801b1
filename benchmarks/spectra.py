"""Update spectra: ours against dense SVD, looped thin QR with SVD, and looped Gram matrices.

    python benchmarks/spectra.py --json spectra.json --write docs/attention_update.md

About five minutes on an idle machine, half of them dense SVDs of 4096 × 4096; ``--quick`` half a
minute. ``--write`` puts the table into the document.

All on the same weights, in one process, on one thread, in float64, interleaved: a round times each
route once, and a figure is the median over rounds. Times are CPU time of the process, which is the
wall clock's on an idle machine. Routes:

* ours: the measures of all four matrices (Δ2, Δ3, ΔW_q, ΔW_k) of all heads in one call;
* ours for Δ2 alone: the same Gram matrices and the measures of Δ2;
* ours with all singular values, which spikes need of ΔW_q and ΔW_k, in the JSON file only;
* dense: the D × D matrix Δ2 of one head and its singular values, times the number of heads;
* looped QR: head by head and matrix by matrix, thin QR of the factors and the SVD of the small
  product, ΔW's from Δ3's factors; `tuned` is our own reference route called head by head, which
  makes no Q and takes all four matrices from two QRs;
* looped Gram: head by head and matrix by matrix, Gram matrices and their product's eigenvalues.

Errors are the largest relative ones of effective rank: of Δ2 against dense for one head, and of all
four matrices against the QR route for all heads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_measures import delta2_measures, update_measures
from mcore_monitors.signals.update_spectra import update_spectra
from mcore_monitors.signals.update_spectra_qr import update_spectra_qr

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
#: marks around the table in a document
_BEGIN, _END = "<!-- speed -->\n", "<!-- end of speed -->"


def make(hidden: int, d: int, heads: int, groups: int, seed: int) -> Weights:
    """Weights before and after a window: noise with a coherent part of half its norm."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    old = [0.02 * draw(n, d, hidden) for n in (heads, groups)]
    new = [
        w + 1e-5 * (draw(*w.shape) + 0.5 * draw(len(w), d, 1) @ draw(len(w), 1, hidden))
        for w in old
    ]
    return (*old, *new)


def dense_delta2(w: Weights, dtype: torch.dtype) -> Tensor:
    """Singular values of the first head's D × D matrix."""
    wq, wk, wq_new, wk_new = (x[0].to(dtype) for x in w)
    return torch.linalg.svdvals((wq_new - wq).T @ wk + wq.T @ (wk_new - wk))


def one_head(w: Weights, head: int) -> Weights:
    """The weights of one head and its key, each with a first dimension of 1."""
    key = head // (len(w[0]) // len(w[1]))
    wq, wk, wq_new, wk_new = w
    return wq[[head]], wk[[key]], wq_new[[head]], wk_new[[key]]


def looped_qr(w: Weights) -> None:
    """Head by head and matrix by matrix: thin QR of the factors, SVD of the small product."""
    for head in range(len(w[0])):
        wq, wk, wq_new, wk_new = (x[0].double() for x in one_head(w, head))
        dq, dk = wq_new - wq, wk_new - wk
        _, r_a = torch.linalg.qr(torch.cat([dq, wq]).T)
        _, r_b = torch.linalg.qr(torch.cat([wk, dk]).T)
        torch.linalg.svdvals(r_a @ r_b.T)
        (_, r_q), (_, r_k) = torch.linalg.qr(dq.T), torch.linalg.qr(dk.T)
        for small in (r_q @ r_k.T, r_q, r_k):
            torch.linalg.svdvals(small)


def looped_qr_tuned(w: Weights) -> None:
    """Head by head: our reference route."""
    for head in range(len(w[0])):
        update_spectra_qr(*one_head(w, head))


def looped_gram(w: Weights) -> None:
    """Head by head and matrix by matrix: two Gram matrices and their product's eigenvalues."""
    for head in range(len(w[0])):
        wq, wk, wq_new, wk_new = (x[0].double() for x in one_head(w, head))
        dq, dk = wq_new - wq, wk_new - wk
        for a, b in ((torch.cat([dq, wq]), torch.cat([wk, dk])), (dq, dk)):
            gram = a @ a.T
            gram.diagonal().add_(1e-13 * gram.trace())
            factor = torch.linalg.cholesky(gram)
            torch.linalg.eigvalsh(factor.T @ (b @ b.T) @ factor)
        for x in (dq, dk):
            torch.linalg.eigvalsh(x @ x.T)


def interleaved(routes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each route, one call of each a round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    for number in range(rounds + 1):
        for name, route in routes.items():
            start = time.process_time()
            route()
            if number:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def gemm_peak(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square product, best of five."""
    n = 1536
    x = torch.randn(n, n, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.process_time()
        x @ x
        times.append(time.process_time() - start)
    return 2 * n**3 / min(times[1:])


def errors(w: Weights, dense: Tensor) -> float:
    """Largest relative error of effective rank."""
    got, reference = update_measures(*w), update_spectra_qr(*w)
    pairs = [(a.effective_rank, effective_rank(b)) for a, b in zip(got, reference, strict=True)]
    pairs.append((got.delta2.effective_rank[0], effective_rank(dense.square())))
    return max(((a - b).abs() / b).max().item() for a, b in pairs)


def measure(hidden: int, d: int, heads: int, groups: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    w = make(hidden, d, heads, groups, seed=hidden + d + heads)
    start = time.process_time()
    dense = dense_delta2(w, torch.float64)
    dense_seconds = time.process_time() - start
    times = interleaved(
        {
            "ours": lambda: update_measures(*w),
            "ours_delta2": lambda: delta2_measures(update_grams(*w)),
            "ours_spectra": lambda: update_spectra(*w),
            "grams": lambda: update_grams(*w),
            "looped_qr": lambda: looped_qr(w),
            "looped_qr_tuned": lambda: looped_qr_tuned(w),
            "looped_gram": lambda: looped_gram(w),
        },
        rounds,
    )
    # Dense is as long as all others together: one measured call where it takes long.
    few = max(1, min(rounds, round(2 / dense_seconds)))
    times |= interleaved(
        {
            "dense": lambda: dense_delta2(w, torch.float64),
            "dense32": lambda: dense_delta2(w, torch.float32),
        }
        if few > 1
        else {"dense32": lambda: dense_delta2(w, torch.float32)},
        few,
    )
    times.setdefault("dense", dense_seconds)
    operations = 6 * d * d * hidden * (heads + groups)  # three of four blocks of each Gram matrix
    ours = times["ours"]
    return {
        "D": hidden,
        "d": d,
        "heads": heads,
        "groups": groups,
        "ours_ms": 1e3 * ours,
        "grams_ms": 1e3 * times["grams"],
        "dense_ms_per_head": 1e3 * times["dense"],
        "ours_delta2_ms": 1e3 * times["ours_delta2"],
        "ours_all_singular_values_ms": 1e3 * times["ours_spectra"],
        "dense_over_ours": heads * times["dense"] / times["ours_delta2"],
        "dense_float32_over_ours": heads * times["dense32"] / times["ours_delta2"],
        "dense_delta2_over_ours_all4": heads * times["dense"] / ours,
        "looped_qr_over_ours_all4": times["looped_qr"] / ours,
        "looped_qr_tuned_over_ours_all4": times["looped_qr_tuned"] / ours,
        "looped_gram_over_ours_all4": times["looped_gram"] / ours,
        "grams_of_peak": operations / times["grams"] / gemm_peak(torch.float64),
        "max_rel_err": errors(w, dense),
    }


def sizes(mode: str) -> list[tuple[int, int, int, int]]:
    """(D, d, heads, groups) of each row."""
    if mode == "quick":
        return [(1024, 64, 16, 16), (2048, 64, 16, 16)]
    hidden, dims, heads = (512, 1024, 2048, 4096), (64, 128), (1, 4, 16, 32)
    if mode == "default":
        rows = [(D, 64, h, h) for D in hidden[:3] for h in (1, 16)]
        rows += [(1024, 128, 16, 16), (4096, 128, 32, 32)]
    else:
        rows = [(D, d, h, h) for D in hidden for d in dims for h in heads]
    return [*rows, (4096, 128, 32, 8)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    text = (
        "| D | d | heads (keys) | all four, ms | Δ2, ms | Gram share | of GEMM peak | "
        "dense / ours | dense in float32 / ours | looped QR / ours | tuned QR / ours | "
        "looped Gram / ours |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        grouped = "" if row["groups"] == row["heads"] else f" ({row['groups']})"
        text += (
            f"| {row['D']} | {row['d']} | {row['heads']}{grouped} | {row['ours_ms']:.1f} | "
            f"{row['ours_delta2_ms']:.1f} | {row['grams_ms'] / row['ours_ms']:.0%} | "
            f"{row['grams_of_peak']:.0%} | {row['dense_over_ours']:.0f} | "
            f"{row['dense_float32_over_ours']:.0f} | {row['looped_qr_over_ours_all4']:.1f} | "
            f"{row['looped_qr_tuned_over_ours_all4']:.1f} | "
            f"{row['looped_gram_over_ours_all4']:.1f} |\n"
        )
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/spectra.py --quick",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_const", dest="mode", const="quick")
    mode.add_argument("--full", action="store_const", dest="mode", const="full")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default 9)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--write", type=Path, help="put the table into this document")
    a = parser.parse_args()
    if a.write:
        before, rest = a.write.read_text().split(_BEGIN)
        after = rest.split(_END)[1]
    torch.set_num_threads(1)
    peak = gemm_peak(torch.float64)
    print(f"one thread, GEMM peak {peak / 1e9:.0f} Gflop/s in float64")
    print(
        "dense, dense in float32: over ours for Δ2 alone; QR, tuned, Gram: over ours for all four\n"
        f"{'D':>5}{'d':>4}{'heads':>6}{'groups':>7}{'all ms':>9}{'Δ2 ms':>8}{'grams':>6}{'peak':>6}"
        f"{'dense':>7}{'fp32':>6}{'QR':>6}{'tuned':>6}{'Gram':>6}{'error':>9}"
    )
    rows = []
    for size in sizes(a.mode or "default"):
        row = measure(*size, rounds=a.rounds)
        rows.append(row)
        print(
            f"{row['D']:5}{row['d']:4}{row['heads']:6}{row['groups']:7}{row['ours_ms']:9.1f}"
            f"{row['ours_delta2_ms']:8.1f}{row['grams_ms'] / row['ours_ms']:6.0%}"
            f"{row['grams_of_peak']:6.0%}{row['dense_over_ours']:7.0f}"
            f"{row['dense_float32_over_ours']:6.0f}{row['looped_qr_over_ours_all4']:6.1f}"
            f"{row['looped_qr_tuned_over_ours_all4']:6.1f}{row['looped_gram_over_ours_all4']:6.1f}"
            f"{row['max_rel_err']:9.0e}",
            flush=True,
        )
    if a.write:
        a.write.write_text(before + _BEGIN + table(rows) + _END + after)
    if a.json:
        result = {
            "rows": rows,
            "gemm_peak_flops": peak,
            "made_by": {
                "command": " ".join(["python", "benchmarks/spectra.py", *sys.argv[1:]]),
                "seed": "D + d + heads of the row",
                "date": datetime.now(UTC).date().isoformat(),
                "cores": f"1 of {os.cpu_count()}",
                "versions": {n: version(n) for n in ("mcore-monitors", "torch")},
            },
        }
        a.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
