"""Which fault breaks which conservation residual, by how much, and at which sample it is caught.

    python benchmarks/conservation.py --json conservation.json

A sample looks at what the monitor looks at by default: attention at every other sample, all else at
every third, and at every one a place with a reading over half its limit; all sequences, one in two
or one in four; some tokens. Each fault begins once at each turn of its place; the latest alarm
counts. --whole looks at all of every sample.

Trains a small language model (benchmarks/conservation_model.py, 16 sequences of 128 bytes of the
standard library's sources a step) for 300 steps without a fault, then, from that checkpoint and for
each fault, strength and format, takes ten healthy samples and three faulty ones, two steps apart.
The tie mechanism of arXiv 2510.04212 needs tied maxima, which a model of this size does not have:
it is run at the kernel's border on tensors that have them, and so is PyTorch's own fused kernel.
Healthy runs go on from the same checkpoint with other data. About twenty minutes on one core;
finished rows are kept in --work and not run again.

What is an alarm: benchmarks/conservation_judge.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from conservation_common import attention_inputs, made_by  # noqa: E402
from conservation_judge import Judge  # noqa: E402
from conservation_model import (  # noqa: E402
    DIM,
    EXPERTS,
    FORMATS,
    HEADS,
    Faults,
    Reading,
    Text,
    Training,
    attention_readings,
    readings,
)

from mcore_monitors.faults.kernel import KernelFault, flash_attention  # noqa: E402
from mcore_monitors.monitors.conservation.turns import stride_of  # noqa: E402

LENGTH, SEQUENCES, WARM_UP, HEALTHY_BEFORE, FAULTY = 128, 16, 300, 10, 3
#: of the faulty runs' data; the rule of the spread was settled on runs with seed 101
SEED = 103
#: fault → (strengths, formats, place, heads)
ALL = tuple(range(HEADS))
KERNEL = {
    "row_term": ((0.0003, 0.001, 0.003, 0.01), FORMATS, ALL),
    "bit_mask": ((16, 18, 20, 22), FORMATS, ALL),
    "backward_scale": ((0.01, 0.1), FORMATS, ALL),
    "stale_row_term": ((0,), FORMATS, ALL),
    "lost_key_block": ((16,), FORMATS, (1,)),
    "mixed_scores": ((0.01, 0.1), FORMATS, (2,)),
    "output_towards_zero": ((0,), FORMATS, ALL),
}
OTHER = {
    "router_lost_column": (Faults(router=2), ("router", 2)),
    "vocabulary_lost_shard": (Faults(vocabulary=1), ("loss", 0)),
    # bytes from 192 on hardly occur: the shard had 2e-4 of the probability
    "vocabulary_lost_rare_shard": (Faults(vocabulary=3), ("loss", 0)),
    "norm_without_projection": (Faults(norm=(2, 0)), ("norm", 2)),
}


def over_floor(found: Iterable[Reading], place: tuple[str, int]) -> dict[str, float]:
    """Residual → largest unit's size over the floor, at one place."""
    return {r.residual: max(r.value) / r.floor for r in found if r.place == place}


def run_fault(
    training: Callable[[], Training],
    fault: Faults,
    place: tuple[str, int],
    units: tuple[int, ...],
    whole: bool,
) -> dict[str, Any]:
    """The fault begun at each turn of its place; the row of the latest alarm."""
    turns = 1 if whole else stride_of(place[0])
    return _latest(turns, lambda first: _run_fault(training(), fault, place, units, whole, first))


def _latest(turns: int, run: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The row of the latest alarm, of runs that begin at samples of so many numbers."""
    rows = [run(first) for first in range(turns)]
    firsts = [row["first_sample"] for row in rows]
    row = rows[max(range(len(rows)), key=lambda i: firsts[i] or math.inf)]
    return row | {
        "first_samples": firsts,
        "site_right": all(r["site_right"] for r in rows),
        "alarms_before": sum(r["alarms_before"] or 0 for r in rows),
    }


def _run_fault(
    training: Training,
    fault: Faults,
    place: tuple[str, int],
    units: tuple[int, ...],
    whole: bool,
    number: int,
) -> dict[str, Any]:
    """Ten healthy samples from that number on, then faulty ones; stops at the first alarm."""
    judge, before, first = Judge(number, whole), 0, None
    row: dict[str, Any] = {"over_floor_by_residual": {}}
    for sample in range(1 - HEALTHY_BEFORE, FAULTY + 1):
        training.model.faults = fault if sample >= 1 else _remembering(fault)
        training.step()
        _, seen = training.step(sample=True)
        alarms = judge.sample(readings(seen, judge.turns))
        if sample < 1:
            before += bool(alarms)
            continue
        # of the first sample that looks at it
        sizes = over_floor(judge.found, place)
        row["over_floor_by_residual"] = sizes | row["over_floor_by_residual"]
        if alarms:
            first = sample
            row["alarms"] = alarms
            right = [a for a in alarms if tuple(a["place"]) == place]
            row["site_right"] = len(right) == len(alarms) and all(
                set(a["units"]) <= set(units) for a in right
            )
            break
    row |= {"first_sample": first, "alarms_before": before}
    row.setdefault("site_right", False)
    return _largest(row)


def _remembering(fault: Faults) -> Faults:
    """No fault yet; a stale row term has to remember the call before."""
    stale = {n: f for n, f in fault.attention.items() if f.kind == "stale_row_term"}
    return Faults(attention={n: KernelFault("stale_row_term", heads=()) for n in stale})


def _largest(row: dict[str, Any]) -> dict[str, Any]:
    """Say as ``over_floor`` that of the residual which alarmed, else the largest."""
    sizes = row["over_floor_by_residual"]
    named = [a["residual"] for a in row.get("alarms", []) if a["residual"] in sizes]
    row["over_floor"] = max(sizes[n] for n in (named or sizes))
    return row


def pytorch_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention of [S, B, H, d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return o.permute(2, 0, 1, 3)


def run_tie(
    kernel: Callable[..., Tensor], seed: int, samples: int, whole: bool
) -> dict[str, Any]:
    """A kernel in bfloat16 on tensors with tied maxima, at its border."""
    turns = 1 if whole else stride_of("attention")
    return _latest(turns, lambda number: _run_tie(kernel, seed, samples, whole, number))


def _run_tie(
    kernel: Callable[..., Tensor], seed: int, samples: int, whole: bool, number: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    judge, first = Judge(number, whole), None
    row: dict[str, Any] = {"over_floor_by_residual": {}}
    for sample in range(1, samples + 1):
        tensors = attention_inputs("two tied sinks", 256, SEQUENCES, HEADS, DIM, generator)
        q, k, v, do = (x.bfloat16() for x in tensors)
        for x in (q, k, v):
            x.requires_grad_()
        o = kernel(q, k, v)
        grads = torch.autograd.grad(o, (q, k, v), do)
        x, g = [t.detach() for t in (q, k, v, o)], [*grads, do]
        alarms = judge.sample(attention_readings(("attention", 1), x, g, judge.turns))
        row["over_floor_by_residual"] = (
            over_floor(judge.found, ("attention", 1)) | row["over_floor_by_residual"]
        )
        if alarms and first is None:
            first = sample
            row |= {"alarms": alarms, "site_right": True}
    row |= {"first_sample": first, "alarms_before": None}
    row.setdefault("site_right", False)
    return _largest(row)


class Kept:
    """Finished rows, in a file that an interrupted run goes on from."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.folder = path.parent
        self._rows = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make: Any) -> Any:
        if key not in self._rows:
            self._rows[key] = make()
            self._path.write_text(json.dumps(self._rows))
        return self._rows[key]


def checkpoint(work: Path) -> dict[str, Any]:
    """The model after its healthy warm-up; trained once."""
    path = work / "checkpoint.pt"
    if not path.exists():
        training = Training(LENGTH, SEQUENCES, seed=0)
        for step in range(WARM_UP):
            loss, _ = training.step()
            if step % 50 == 49:
                print(f"warm-up step {step + 1}: loss {loss:.2f}", flush=True)
        torch.save(
            {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()},
            path,
        )
    return torch.load(path)


def started(saved: dict[str, Any], fmt: str, seed: int) -> Training:
    """A training that goes on from the checkpoint with data of its own."""
    training = Training(LENGTH, SEQUENCES, seed=0)
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    training.steps = WARM_UP
    training.model.format = fmt
    training.text = Text(LENGTH, SEQUENCES, seed)
    return training


def run_healthy(
    saved: dict[str, Any], fmt: str, seed: int, samples: int, whole: bool
) -> dict[str, Any]:
    """A run without a fault, every step sampled: alarms of each kind and largest sizes."""
    training, judge = started(saved, fmt, seed), Judge(0, whole)
    sizes, directions, largest = 0, 0, 0.0
    for _ in range(samples):
        _, seen = training.step(sample=True)
        alarms = judge.sample(readings(seen, judge.turns))
        sizes += any(a["by"] == "size" for a in alarms)
        directions += any(a["by"] != "size" for a in alarms)
        largest = max(largest, *(max(r.value) / r.limit for r in judge.found))
    return {
        "format": fmt, "seed": seed, "samples": samples, "over_limit": sizes,
        "direction_alarms": directions, "largest_over_limit": largest,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/conservation.py --json conservation.json",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "conservation")
    parser.add_argument("--healthy", type=int, default=5, help="healthy runs of each format")
    parser.add_argument("--samples", type=int, default=40, help="samples of a healthy run")
    parser.add_argument("--whole", action="store_true", help="look at all of each sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    whole = arguments.whole
    kept = Kept(arguments.work / ("rows_whole.json" if whole else "rows_in_turn.json"))
    saved = checkpoint(arguments.work)
    rows = []

    def done(name: str, strength: float, fmt: str, row: dict[str, Any]) -> None:
        rows.append({"fault": name, "strength": strength, "format": fmt} | row)
        sizes = "  ".join(f"{n} {v:.2g}" for n, v in row["over_floor_by_residual"].items())
        by = sorted({a["residual"] + " " + a["by"] for a in row.get("alarms", [])})
        print(
            f"{name:24} {strength:<7g} {fmt:14} first "
            f"{row.get('first_samples', row['first_sample'])} site "
            f"{'right' if row['site_right'] else 'not named'} | {sizes} | {'; '.join(by)}",
            flush=True,
        )

    for name, (strengths, formats, heads) in KERNEL.items():
        for strength in strengths:
            for fmt in formats:
                if name == "bit_mask" and strength == 16 and fmt != "fp32":
                    continue  # these bits are none of bfloat16's

                def make(name=name, strength=strength, fmt=fmt, heads=heads) -> dict[str, Any]:
                    fault = KernelFault(name, strength, None if heads == ALL else heads)
                    training = partial(started, saved, fmt, seed=SEED)
                    return run_fault(
                        training, Faults(attention={1: fault}), ("attention", 1), heads, whole
                    )

                done(name, strength, fmt, kept.get(f"{name} {strength} {fmt}", make))
    for name, (fault, place) in OTHER.items():
        for fmt in FORMATS:

            def make(fault=fault, place=place, fmt=fmt) -> dict[str, Any]:
                training = partial(started, saved, fmt, seed=SEED)
                return run_fault(training, fault, place, (0,), whole)

            row = kept.get(f"{name} {fmt}", make)
            done(name, 1 / EXPERTS if place[0] == "router" else 1, fmt, row)
    written_out = partial(flash_attention, scale=DIM**-0.5)
    for name, kernel in (
        ("tie", partial(written_out, fault=KernelFault("tie"))),
        ("tie_in_pytorch_flash", pytorch_flash),
    ):
        done(name, 2, "bf16", kept.get(name, lambda k=kernel: run_tie(k, 1, FAULTY, whole)))
    healthy = [
        kept.get(
            f"healthy {fmt} {seed} {arguments.samples}",
            lambda f=fmt, s=seed: run_healthy(saved, f, s, arguments.samples, whole),
        )
        for fmt in FORMATS
        for seed in range(201, 201 + arguments.healthy)
    ]
    tied = kept.get("healthy tie", lambda: run_tie(written_out, 2, 30, whole))
    for row in healthy:
        print("healthy", row, flush=True)
    print("tied tensors, right kernel, 30 samples: first alarm", tied["first_sample"])
    result = {
        "faults": rows,
        "healthy_runs": len(healthy),
        "healthy_over_limit": sum(r["over_limit"] > 0 for r in healthy),
        "healthy_direction_alarms": sum(r["direction_alarms"] > 0 for r in healthy),
        "healthy": healthy,
        "tied_healthy_first_alarm": tied["first_sample"],
        # of a training step; measured by benchmarks/overhead.py
        "share_conservation": _share(),
        "made_by": made_by(seed=[0, SEED, *range(201, 201 + arguments.healthy)]),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _share() -> float | None:
    path = ROOT / "benchmarks" / "results" / "overhead.json"
    return json.loads(path.read_text()).get("share_conservation") if path.exists() else None


if __name__ == "__main__":
    main()
