"""What the conservation benchmarks share: attention inputs, and what made a kept result."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: kind → what it stands for
KINDS = {
    "random": "independent normal numbers",
    "common": "queries, values and dO with a part in common, as in a trained model",
    "trained": "queries and keys with a part in common per head, dO of very unequal rows",
    "large logits": "queries ten times as long",
    "sink": "nearly all attention on the first key",
    "sink, constant dO": "the same, dO nearly one vector: dK almost vanishes",
    "extreme sink": "logits of 30 and more on the first key, dO one vector: dK vanishes",
    "two tied sinks": "two equal keys take nearly all, V of one sign, dO with a common part: every "
    "row rounds alike",
    "constant V and dO": "nearly no difference between values: dS almost vanishes",
}


def attention_inputs(
    kind: str, length: int, sequences: int, heads: int, dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and dO of one of :data:`KINDS`, each [S, B, H, d] float32."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    whole = (length, sequences, heads, dim)
    q, k, v, do = (normal(*whole) for _ in range(4))
    one = (1, sequences, heads, dim)
    if kind == "common":
        q, v, do = (x + size * normal(*one) for x, size in ((q, 2), (v, 1), (do, 1)))
    elif kind == "trained":
        q = 1.5 * (q + 2 * normal(1, 1, heads, dim))
        k = k + 2 * normal(1, 1, heads, dim)
        v = v + 0.5 * normal(1, 1, heads, dim)
        do = do * torch.rand(length, sequences, 1, 1, generator=generator) ** 3
        do = do + 0.1 * normal(1, sequences, 1, dim)
    elif kind == "large logits":
        q = 10 * q
    elif kind == "two tied sinks":
        # The others have e^-11 of a sink's weight: enough to turn every tie of a biased kernel's
        # rounding the same way, too little for more.
        reach = (11 * dim**0.5) ** 0.5
        towards = torch.nn.functional.normalize(normal(1, 1, heads, dim), dim=-1)
        q, k = 0.3 * q + reach * towards, 0.3 * k
        k[:2] = reach * towards[0]
        v = -1 - torch.rand(whole, generator=generator)
        do = do + 1
    elif "sink" in kind:
        towards = torch.nn.functional.normalize(normal(1, 1, heads, dim), dim=-1)
        if kind == "extreme sink":
            q, k[0] = q + 20 * towards, k[0] + 12 * towards[0]
            do = normal(*one).expand(whole).contiguous()
        else:
            q, k[0] = q + 6 * dim**0.25 * towards, k[0] + 8 * dim**0.25 * towards[0]
            if "constant" in kind:
                do = normal(*one) + 0.05 * do
    elif kind == "constant V and dO":
        v, do = normal(*one) + 0.02 * v, normal(*one) + 0.02 * do
    return q, k, v, do


def made_by(seed: int | list[int]) -> dict[str, Any]:
    """What a kept result has to say about its origin."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "versions": {n: version(n) for n in ("mcore-monitors", "torch")},
    }
