"""Spikes and their persistence in a small real training, healthy and with a faulty attention.

    python benchmarks/onset_training.py --json onset_training.json

A byte-level GPT (2 layers, hidden 128, 4 heads, sequence 128, batch 4) on the standard library's
sources, AdamW at 1e-3 with 100 steps of warm-up. From one checkpoint two arms with the same data:
healthy, and with the row term of the softmax backward off by C·mean|row term|, the same sign every
step (arXiv 2510.04212 has the natural fault). White noise is what the spike estimator's edge
assumes; this says what it does where noise is not white. One seed, one run an arm.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import sysconfig
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcore_monitors.signals.direction import direction_overlap, leading_directions
from mcore_monitors.signals.spectra import measures
from mcore_monitors.signals.spike import persistent_spike, spike
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_spectra import spectra_from_grams

LAYERS, HIDDEN, HEADS, LENGTH, BATCH, WINDOW = 2, 128, 4, 128, 4, 50


class FaultySoftmax(torch.autograd.Function):
    """Softmax whose backward adds ``strength`` times its mean size to the row term."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, strength: float) -> Tensor:
        p = scores.softmax(-1)
        ctx.save_for_backward(p)
        ctx.strength = strength
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        row = (p * grad).sum(-1, keepdim=True)
        return p * (grad - row - ctx.strength * row.abs().mean()), None


class Block(nn.Module):
    """One layer, norms in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN)
        )

    def forward(self, x: Tensor, strength: float) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores + torch.full((LENGTH, LENGTH), -1e9).triu(1)
        y = FaultySoftmax.apply(scores, strength) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """A small GPT over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, HIDDEN)
        self.places = nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, strength: float) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x, strength)
        return self.head(self.norm(x))

    def attention(self) -> tuple[Tensor, Tensor]:
        """W_q and W_k of all heads of all layers, [layers · heads, d, D]."""
        fused = torch.stack([b.qkv.weight.detach() for b in self.blocks])
        parts = fused.unflatten(1, (3, HEADS, -1))
        return parts[:, 0].flatten(0, 1).clone(), parts[:, 1].flatten(0, 1).clone()


def text() -> Tensor:
    """The standard library's sources as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def train(
    model: Model, optimizer: Any, data: Tensor, steps: range, strength: float, arm: str
) -> list[dict[str, Any]]:
    """Train over ``steps``, and look at the heads' updates every window."""
    rows: list[dict[str, Any]] = []
    old, planes, outliers = model.attention(), None, None
    for step in steps:
        g = torch.Generator().manual_seed(step)
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=g)
        batch = torch.stack([data[i : i + LENGTH + 1] for i in starts]).long()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100)
        logits = model(batch[:, :-1], strength)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % WINDOW:
            continue
        new = model.attention()
        grams = update_grams(*old, *new)
        spectra = spectra_from_grams(grams)
        found, now = spike(spectra.query, HIDDEN), leading_directions(grams, *old, *new)
        row = {"arm": arm, "step": step + 1, "loss": loss.item(), "gradient_norm": norm.item()}
        row["delta2_effective_rank"] = measures(spectra.delta2).effective_rank.tolist()
        row["outliers"], row["strength"] = found.outliers.tolist(), found.strength.tolist()
        if planes is not None:
            overlap = direction_overlap(now, planes)
            both = torch.stack([outliers, found.outliers])
            row["overlap"] = overlap.tolist()
            row["persistent"] = persistent_spike(both, overlap[None]).tolist()
        rows.append(row)
        show(row)
        old, planes, outliers = new, now, found.outliers
    return rows


def show(row: dict[str, Any]) -> None:
    """One line: smallest, median and largest over heads."""

    def spread(name: str, digits: int) -> str:
        values = sorted(row.get(name) or [math.nan])
        middle = values[len(values) // 2]
        return " ".join(f"{v:.{digits}f}" for v in (values[0], middle, values[-1]))

    print(
        f"{row['arm']:8}{row['step']:5}  loss {row['loss']:.2f}  norm {row['gradient_norm']:6.2f}  "
        f"Δ2 {spread('delta2_effective_rank', 1):14}  outliers {spread('outliers', 0):8}  "
        f"strength {spread('strength', 1):17}  overlap {spread('overlap', 2):14}  "
        f"persistent {sum(row.get('persistent', []))}",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/onset_training.py --strength 0.003",
    )
    parser.add_argument("--strength", type=float, default=0.01, help="C (default 0.01)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    model, data = Model(), text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rows = train(model, optimizer, data, range(400), 0.0, "before")
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for arm, strength in (("healthy", 0.0), ("faulty", a.strength)):
        weights, moments = copy.deepcopy(state)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        rows += train(model, optimizer, data, range(400, 700), strength, arm)
    if a.json:
        result = {
            "rows": rows,
            "made_by": {
                "command": " ".join(["python", "benchmarks/onset_training.py", *sys.argv[1:]]),
                "seed": a.seed,
                "date": datetime.now(UTC).date().isoformat(),
                "cores": f"1 of {os.cpu_count()}",
                "versions": {n: version(n) for n in ("mcore-monitors", "torch")},
            },
        }
        a.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
