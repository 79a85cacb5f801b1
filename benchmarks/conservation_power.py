"""The smallest row-term fault that 20 samples show, against the length of the sequence.

    python benchmarks/conservation_power.py --json power.json --figure docs/conservation_power.svg

One false alarm in 10⁵ samples, all tests of a sample together. Three parts, each resumable
(finished rows are kept in --work); about 20 minutes on one core at the lowest priority:

1. *Residual.* The model of benchmarks/conservation.py after its warm-up (weights held still) shows
   queries, keys, values and dO of layer 1 on text of each length, two sequences a sample; the
   direct injector runs on them in float32 and bfloat16 at strengths that double. Caught: size over
   its limit, or direction over the last 1, 3, 10 or 20 samples (rule of conservation.py).
2. *Null.* Healthy bfloat16 and float32 kernels on random trained-like tensors at 128: how often
   the bound on p is undercut in windows of 24 sequences, and the tail of the size.
3. *Baselines.* Real trainings from the same checkpoint at length 128 with the injector in both
   layers: 20 samples, ten steps apart, before the fault and 20 after it. Effective rank of Δ2
   (window 50, any head, low) and gradient norm (high) alarm at six robust deviations from the 20
   samples before, in logarithms, three samples in a row: the rule of the product's bands.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import conservation as bench  # noqa: E402
import conservation_judge as judge  # noqa: E402
from conservation_common import attention_inputs, made_by  # noqa: E402
from conservation_model import (  # noqa: E402
    DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    Faults,
    Text,
    Training,
    attention_readings,
)

from mcore_monitors.faults.kernel import KernelFault, flash_attention  # noqa: E402
from mcore_monitors.signals import conservation as c  # noqa: E402
from mcore_monitors.signals.spectra import effective_rank  # noqa: E402
from mcore_monitors.signals.update_spectra import update_spectra  # noqa: E402

LENGTHS = (128, 256, 512, 1024, 2048)
STRENGTHS = {
    "fp32": [5e-7 * 2**k for k in range(4)],
    "bf16": [2.5e-5 * 2**k for k in range(6)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLES, SEQUENCES = 20, 2
WINDOWS = (1, 3, 10, 20)
#: tests of one sample: two directions a layer, four windows
TESTS = len(WINDOWS) * LAYERS * 2
TRAINED = (3e-4, 1e-3, 3e-3, 1e-2)


def shown(saved: dict[str, Any], length: int, seed: int) -> list[torch.Tensor]:
    """Q, K, V and dO [S, B, H, d] of layer 1 on one sample of text."""
    training = bench.started(saved, "fp32", seed)
    training.text = Text(length, SEQUENCES, seed)
    training.model.seen = {}
    training.model(*training.text.batch()).backward()
    q, k, v, o = training.model.seen["attention", 1]
    return [x.detach() for x in (q, k, v)] + [o.grad]


def residual_sample(tensors: list[torch.Tensor], fmt: str, strength: float) -> dict[str, Any]:
    """Direction sums and sizes of the key shift of one sample, one sequence at a time."""
    sums, sizes = torch.zeros(2, HEADS, 4, dtype=torch.float64), torch.zeros(HEADS)
    fault = KernelFault("row_term", strength) if strength else None
    for b in range(SEQUENCES):
        q, k, v, do = (x[:, b : b + 1].to(DTYPES[fmt]) for x in tensors)
        for x in (q, k, v):
            x.requires_grad_()
        o = flash_attention(q, k, v, scale=DIM**-0.5, fault=fault)
        grads = torch.autograd.grad(o, (q, k, v), do)
        x = [t.detach() for t in (q, k, v, o)]
        reading = next(attention_readings(("attention", 1), x, [*grads, do]))
        sums += reading.direction
        sizes += torch.tensor(reading.value) / SEQUENCES
    return {"sums": sums.tolist(), "sizes": sizes.tolist()}


def caught_at(samples: list[dict[str, Any]], fmt: str, length: int) -> tuple[int | None, str]:
    """The first sample with an alarm, and what gave it."""
    floor = c.floor("key_shift", DTYPES[fmt], length, DIM)
    limit = c.limit("key_shift", DTYPES[fmt], length, DIM)
    every = torch.tensor([s["sums"] for s in samples], dtype=torch.float64)
    for n in range(1, len(samples) + 1):
        if max(samples[n - 1]["sizes"]) > limit:
            return n, "size"
        for window in WINDOWS:
            if window > n:
                continue
            for sums in every[n - window : n].sum(0):
                sure = c.direction_layer_log_p(sums) <= math.log(judge.LEVEL / TESTS)
                if sure and c.direction_bias(sums).max() >= judge.LEAST_BIAS * floor:
                    return n, f"direction over {window}"
    return None, ""


def residual_rows(
    saved: dict[str, Any], kept: bench.Kept, lengths: list[int], repeats: int, seed: int
) -> list[dict[str, Any]]:
    """One row for each length, format, repeat and strength."""
    rows = []
    for repeat in range(repeats):
        first = seed + 1000 * repeat
        for length in lengths:
            samples = [
                kept.get(
                    f"sample {length} {first + i}",
                    lambda n=length, s=first + i: one_sample(saved, n, s),
                )
                for i in range(SAMPLES)
            ]
            for fmt, strengths in STRENGTHS.items():
                for i, strength in enumerate(strengths):
                    at, by = caught_at([s[fmt][i] for s in samples], fmt, length)
                    rows.append(
                        {
                            "length": length, "format": fmt, "strength": strength,
                            "repeat": repeat, "first_sample": at, "by": by,
                        }
                    )  # fmt: skip
                    print(f"length {length:5} {fmt} strength {strength:.1e}: {at} {by}", flush=True)
    return rows


def one_sample(saved: dict[str, Any], length: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """What one sample shows in each format at each strength."""
    tensors = shown(saved, length, seed)
    return {
        fmt: [residual_sample(tensors, fmt, strength) for strength in strengths]
        for fmt, strengths in STRENGTHS.items()
    }


def smallest(rows: list[dict[str, Any]], fmt: str, length: int) -> float | None:
    """The smallest strength from which on every one was caught in every repeat."""
    found = None
    for strength in reversed(STRENGTHS[fmt]):
        mine = [
            r for r in rows if (r["format"], r["length"], r["strength"]) == (fmt, length, strength)
        ]
        if not mine or not all(r["first_sample"] for r in mine):
            break
        found = strength
    return found


def null(fmt: str, seed: int, calls: int = 160, window: int = 24) -> dict[str, Any]:
    """Independent healthy draws at 128: p's bound over windows, and the tail of the size."""
    generator = torch.Generator().manual_seed(seed)
    log_p, sizes = [], []
    for call in range(calls):
        kind = ("common", "trained")[call % 2]
        q, k, v, do = (
            x.to(DTYPES[fmt]) for x in attention_inputs(kind, 128, window, 4, 64, generator)
        )
        for x in (q, k, v):
            x.requires_grad_()
        o = flash_attention(q, k, v, scale=64**-0.5)
        dk = torch.autograd.grad(o, k, do)[0]
        x = [t.detach() for t in (q, o)]
        signed, scale = c.key_shift_terms(dk, query=x[0], output=x[1], grad_output=do)
        along = c.key_shift_along(signed, c.key_shift_directions(x[0], x[1], do, 4))
        log_p += [c.direction_log_p(c.direction_terms(a, scale)) for a in along]
        sizes.append((signed.norm(dim=-1) / scale).flatten())
    p, size = torch.cat(log_p).exp(), torch.cat(sizes)
    limit = c.limit("key_shift", DTYPES[fmt], 128, 64)
    # exponential tail through the 99% and 99.9% quantiles, carried on to the limit
    a, b = (torch.quantile(size.double(), x).item() for x in (0.99, 0.999))
    beyond = 1e-3 * 10 ** (-(limit - b) / (b - a))
    return {
        "format": fmt, "windows": len(p), "sequences_per_window": window, "seed": seed,
        "share_with_p_below": {str(x): (p <= x).double().mean().item() for x in (0.1, 0.01, 1e-3)},
        "smallest_p": p.min().item(),
        "single_sequences": len(size), "largest_size_over_limit": (size.max() / limit).item(),
        "extrapolated_share_of_single_sequences_over_limit": beyond,
    }  # fmt: skip


def _weights(training: Training) -> tuple[torch.Tensor, torch.Tensor]:
    """W_q and W_k of all layers, [L·H, d, D] each."""
    q, k = [], []
    for weight in training.model.qkv:
        parts = weight.detach().view(3, HEADS, DIM, HIDDEN)
        q.append(parts[0])
        k.append(parts[1])
    return torch.cat(q).clone(), torch.cat(k).clone()


def _run(training: Training, history: list[Any], samples: int) -> list[list[float]]:
    """[log of the smallest effective rank's head values..., log gradient norm] of each sample."""
    rows = []
    for _ in range(samples):
        for _ in range(10):
            training.step()
        history.append(_weights(training))
        if len(history) > 6:
            del history[0]
        ranks = [float("nan")] * LAYERS * HEADS
        if len(history) == 6:
            ranks = effective_rank(update_spectra(*history[0], *history[-1]).delta2).tolist()
        rows.append([math.log(x) for x in (*ranks, training.gradient_norm)])
    return rows


def baselines(
    saved: dict[str, Any], kept: bench.Kept, strengths: list[float]
) -> list[dict[str, Any]]:
    """When Δ2's effective rank and the gradient norm see each strength; None: not in 20 samples."""
    path = kept.folder / "before.pt"
    if not path.exists():
        training, history = Training(128, 8, seed=0), []
        training.model.load_state_dict(saved["model"])
        training.optimizer.load_state_dict(saved["optimizer"])
        training.steps, training.text = bench.WARM_UP, Text(128, 8, 301)
        _run(training, history, 5)
        torch.save((training, history, _run(training, history, SAMPLES)), path)
    rows = []
    for strength in (0.0, *strengths):

        def make(strength=strength) -> list[list[float]]:
            training, history, _ = copy.deepcopy(torch.load(path, weights_only=False))
            if strength:
                faults = {n + 1: KernelFault("row_term", strength) for n in range(LAYERS)}
                training.model.faults = Faults(attention=faults)
            return _run(training, history, SAMPLES)

        after = torch.tensor(kept.get(f"training {strength}", make), dtype=torch.float64)
        before = torch.tensor(torch.load(path, weights_only=False)[2], dtype=torch.float64)
        centre = before.median(0).values
        spread = 1.4826 * (before - centre).abs().median(0).values
        z = (after - centre) / spread
        found = {"delta2": _first(-z[:, :-1]), "gradient_norm": _first(z[:, -1:])}
        rows.append({"strength": strength, "length": 128, "first_sample": found})
        print(f"training with strength {strength:g}: first sample {found}", flush=True)
    return rows


def _first(z: torch.Tensor) -> int | None:
    """First sample that ends a run of three above six in some column."""
    high = z > 6
    runs = (high[2:] & high[1:-1] & high[:-2]).any(1).nonzero()
    return int(runs[0]) + 3 if len(runs) else None


def figure(result: dict[str, Any], path: Path) -> None:
    """Smallest strength against length, log-log."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = drawing.subplots()
    for fmt, colour in (("fp32", "#1f6f8b"), ("bf16", "#c0562b")):
        points = [(p["length"], p[fmt]) for p in result["smallest"] if p[fmt]]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"key shift, {fmt}")
    tried = max((r["strength"] for r in result["baselines"]), default=None)
    for name, style, offset in (("delta2", "D", 0.97), ("gradient_norm", "s", 1.03)):
        seen = [
            r["strength"] for r in result["baselines"] if r["strength"] and r["first_sample"][name]
        ]
        label = {"delta2": "Δ2 effective rank, fp32", "gradient_norm": "gradient norm, fp32"}[name]
        if seen:
            axes.plot([128 * offset], [min(seen)], style, color="#555", label=label)
        elif tried:
            label += f": not seen up to {tried:g}"
            axes.plot([128 * offset], [tried], style, color="#555", fillstyle="none", label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="keys in a sequence",
        ylabel="smallest strength caught in 20 samples",
    )  # fmt: skip
    ticks = [p["length"] for p in result["smallest"]]
    axes.set_xticks(ticks, [str(n) for n in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawing.savefig(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: nice -n 19 python benchmarks/conservation_power.py --json power.json",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--figure", type=Path, help="write the curve to this SVG or PNG file")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "conservation")
    parser.add_argument(
        "--part",
        choices=("all", "null", "residual", "baselines"),
        default="all",
        help="make the rows of one part only, for a start in several processes",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="KEYS")
    parser.add_argument(
        "--trained", type=float, nargs="+", default=TRAINED, metavar="STRENGTH",
        help="strengths of the trainings for the baselines",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    saved = bench.checkpoint(arguments.work)

    def wanted(part: str) -> bench.Kept | None:
        """The part's kept rows; None where another process is on it."""
        if arguments.part not in (part, "all"):
            return None
        return bench.Kept(arguments.work / f"power_{part}.json")

    rows, nulls, trained = [], [], []
    if kept := wanted("null"):
        nulls = [kept.get(f, lambda f=f: null(f, arguments.seed)) for f in DTYPES]
    for row in nulls:
        print(row, flush=True)
    if kept := wanted("residual"):
        rows = residual_rows(saved, kept, arguments.lengths, arguments.repeats, arguments.seed)
    if kept := wanted("baselines"):
        trained = baselines(saved, kept, arguments.trained)
    if arguments.part != "all":
        return
    result = {
        "smallest": [
            {"length": n} | {fmt: smallest(rows, fmt, n) for fmt in STRENGTHS}
            for n in arguments.lengths
        ],
        "residual": rows,
        "null": nulls,
        "baselines": trained,
        "made_by": made_by(seed=arguments.seed),
    }
    for row in result["smallest"]:
        print(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.figure:
        figure(result, arguments.figure)


if __name__ == "__main__":
    main()
