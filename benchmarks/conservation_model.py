"""A small language model whose kernels can lie: what the conservation benchmarks train.

Two layers, hidden 128, four heads of 32 channels, rotary positions, RMSNorm, a dense block and one
of eight experts (softmax, top 2, auxiliary loss .01), byte-level text (the standard library's own
sources, as launch/text.py packs them). Formats: ``fp32``; ``bf16``, float32 with every watched
border rounded to bfloat16 and attention computed as a bfloat16 kernel does; ``bf16 autocast``,
PyTorch's own.

Shape names: ``S`` tokens, ``B`` sequences, ``D`` hidden, ``H`` heads, ``E`` experts.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "launch")]

from text import END_OF_DOCUMENT, VOCABULARY, sources  # noqa: E402

from mcore_monitors.faults.kernel import KernelFault, flash_attention  # noqa: E402
from mcore_monitors.faults.loss import sharded_cross_entropy  # noqa: E402
from mcore_monitors.faults.norm import norm  # noqa: E402
from mcore_monitors.faults.router import lose_column  # noqa: E402
from mcore_monitors.monitors.conservation import ONE_IN, TOKENS  # noqa: E402
from mcore_monitors.monitors.conservation.turns import Turns, norm_place  # noqa: E402
from mcore_monitors.signals import conservation as c  # noqa: E402

LAYERS, HIDDEN, HEADS, DIM, EXPERTS, EPS = 2, 128, 4, 32, 8, 1e-5
FORMATS = ("fp32", "bf16", "bf16 autocast")


@dataclass
class Faults:
    """What is wrong with which module; all off by default. Layers are counted from 1."""

    #: layer → kernel fault
    attention: dict[int, KernelFault] = field(default_factory=dict)
    #: layer whose router loses the gradient of its last expert
    router: int | None = None
    #: (layer, which of its two norms) without the projection in the backward pass
    norm: tuple[int, int] | None = None
    #: shard of four that cross-entropy's reduction leaves out
    vocabulary: int | None = None


#: what one call shows: tensors whose gradients are there after the backward pass
Seen = dict[tuple[str, int], tuple[Tensor, ...]]


class Model(nn.Module):
    """The model; ``seen`` is filled on steps where it is a dict."""

    def __init__(self) -> None:
        super().__init__()

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(*shape))

        self.embedding = matrix(VOCABULARY, HIDDEN)
        self.qkv = nn.ParameterList(matrix(3 * HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.out = nn.ParameterList(matrix(HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.up, self.down = matrix(4 * HIDDEN, HIDDEN), matrix(HIDDEN, 4 * HIDDEN)
        self.router = matrix(EXPERTS, HIDDEN)
        self.expert_up = matrix(EXPERTS, 2 * HIDDEN, HIDDEN)
        self.expert_down = matrix(EXPERTS, HIDDEN, 2 * HIDDEN)
        self.norms = nn.ParameterList(
            nn.Parameter(torch.ones(HIDDEN)) for _ in range(2 * LAYERS + 1)
        )
        self.head = matrix(VOCABULARY, HIDDEN)
        self.faults = Faults()
        self.format = "fp32"
        self.seen: Seen | None = None

    def border(self, x: Tensor) -> Tensor:
        """A tensor as it crosses a watched border; an alias, so that only this use is seen."""
        return x.bfloat16() if self.format == "bf16" else x.view_as(x)

    def watch(self, kind: str, place: int, *tensors: Tensor) -> None:
        if self.seen is not None:
            for x in tensors:
                x.retain_grad()
            self.seen[kind, place] = tensors

    def normed(self, x: Tensor, index: int) -> Tensor:
        x = self.border(x)
        projected = self.faults.norm != (index // 2 + 1, index % 2)
        weight = self.norms[index].to(x.dtype)
        if projected:
            y = F.rms_norm(x, (HIDDEN,), weight, eps=EPS)
        else:
            y = norm(x, weight, eps=EPS, projected=False)
        self.watch("norm", index, x, y)
        return y.float() if self.format == "bf16" else y

    def attend(self, x: Tensor, layer: int) -> Tensor:
        length, batch, _ = x.shape
        qkv = F.linear(x, self.qkv[layer - 1]).view(length, batch, 3, HEADS, DIM).unbind(2)
        q, k = (rotated(t) for t in qkv[:2])
        q, k, v = (self.border(t.to(qkv[2].dtype)) for t in (q, k, qkv[2]))
        fault = self.faults.attention.get(layer)
        if self.format == "bf16 autocast" and (fault is None or not fault.active):
            o = F.scaled_dot_product_attention(
                *(t.permute(1, 2, 0, 3) for t in (q, k, v)), is_causal=True
            ).permute(2, 0, 1, 3)
        else:
            o = flash_attention(q, k, v, scale=DIM**-0.5, fault=fault)
        self.watch("attention", layer, q, k, v, o)
        return F.linear(o.to(x.dtype).flatten(2), self.out[layer - 1])

    def route(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        z = self.border(F.linear(x, self.router))
        self.watch("router", layer, z)
        if self.faults.router == layer:
            z = lose_column(z, EXPERTS - 1)
        p = z.float().softmax(-1)
        weight, chosen = p.topk(2, dim=-1)
        gate = torch.zeros_like(p).scatter(-1, chosen, weight)
        up = torch.einsum("sbd,efd->sbef", x, self.expert_up)
        y = torch.einsum("sbef,edf,sbe->sbd", F.gelu(up), self.expert_down, gate.to(up.dtype))
        share = (gate > 0).float().mean((0, 1))
        return y, 0.01 * EXPERTS * (share * p.mean((0, 1))).sum() / 2

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Loss of [S, B] tokens."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.format == "bf16 autocast"):
            x = self.embedding[tokens]
            x = x + self.attend(self.normed(x, 0), 1)
            x = x + F.linear(F.gelu(F.linear(self.normed(x, 1), self.up)), self.down)
            x = x + self.attend(self.normed(x, 2), 2)
            y, auxiliary = self.route(self.normed(x, 3), 2)
            logits = self.border(F.linear(self.normed(x + y, 4), self.head))
            self.watch("loss", 0, logits)
            loss = sharded_cross_entropy(logits, target, shards=4, lost=self.faults.vocabulary)
            return loss.mean() + auxiliary


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of [S, B, H, d]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@dataclass(frozen=True)
class Reading:
    """One residual at one place: its size per unit, and terms for evidence over samples."""

    residual: str
    place: tuple[str, int]
    value: list[float]
    limit: float
    floor: float
    #: of the key shift, sums of :func:`direction_terms` over the sample's sequences: [2, units, 4]
    direction: Tensor | None
    #: of query–key, sums of squares and numbers of sequences: [units, 2]
    spread: Tensor | None


@torch.no_grad()
def attention_readings(
    place: tuple[str, int],
    tensors: list[Tensor],
    gradients: list[Tensor],
    turns: Turns | None = None,
) -> Iterator[Reading]:
    """The three attention residuals from (Q, K, V, O) and their gradients, [S, B, H, d] each.

    Args:
        turns: the monitor's own choice of samples and sequences. None looks at all of them.
    """
    if not _is_due(place, turns):
        return
    sizes = (len(tensors[0]), tensors[1].shape[-1], tensors[1].dtype)

    def some(one_in: int) -> tuple[Tensor, ...]:
        at = slice(None) if turns is None else turns.some("attention", one_in)
        return tuple(x[:, at] for x in (*tensors, *gradients))

    q, k, v, o, dq, dk, dv, do = some(ONE_IN["attention/key_shift"])
    signed, scale = c.key_shift_terms(dk, query=q, output=o, grad_output=do)
    along = c.key_shift_along(signed, c.key_shift_directions(q, o, do, k.shape[2]))
    directions = torch.stack([c.direction_terms(x, scale) for x in along]).double()
    ratio = c.key_shift_from_terms(signed, scale)
    yield _reading("key_shift", place, ratio, *sizes, direction=directions)
    q, k, v, o, dq, dk, dv, do = some(ONE_IN["attention/value_output"])
    ratio = c.value_output_from_terms(*c.value_output_terms(v, dv, o, do))
    yield _reading("value_output", place, ratio, *sizes)
    q, k, v, o, dq, dk, dv, do = some(ONE_IN["attention/query_key"])
    signed, squares = c.query_key_terms(q, dq, k, dk)
    *ratio, power = c.query_key_sums(signed, squares)
    spread = torch.stack([power, ratio[1]], dim=-1).double()
    yield _reading("query_key", place, ratio, *sizes, spread=spread)


def _is_due(place: tuple[str, int], turns: Turns | None) -> bool:
    kind, number = place
    return turns is None or turns.is_due(kind, norm_place(number, 0) if kind == "norm" else number)


@torch.no_grad()
def readings(seen: Seen, turns: Turns | None = None) -> Iterator[Reading]:
    """All residuals of one sample, from the tensors it showed and their gradients."""
    for place, tensors in seen.items():
        x, g = [t.detach() for t in tensors], [t.grad for t in tensors]
        if place[0] == "attention":
            yield from attention_readings(place, x, g, turns)
            continue
        if not _is_due(place, turns):
            continue
        if place[0] == "norm":
            residual = "norm_scale"
            if turns is not None:
                at = turns.some("norm", max(1, x[0].shape[:-1].numel() // TOKENS))
                x, g = ([t.flatten(0, 1)[at] for t in some] for some in (x, g))
            terms = c.norm_scale_terms(x[0], g[0], x[1], g[1], eps=EPS, centred=False)
            ratio = c.norm_scale_from_terms(*terms)
        elif place[0] == "router":
            residual = "router_shift"
            ratio = c.router_shift_from_terms(*c.router_shift_terms(g[0]))
        else:
            residual = "vocabulary_shift"
            ratio = c.vocabulary_shift_from_terms(*c.vocabulary_shift_terms(g[0]))
        yield _reading(residual, place, ratio, len(tensors[0]), x[0].shape[-1], x[0].dtype)


def _reading(
    residual: str,
    place: tuple[str, int],
    ratio: tuple[Tensor, Tensor],
    length: int,
    size: int,
    dtype: torch.dtype,
    *,
    direction: Tensor | None = None,
    spread: Tensor | None = None,
) -> Reading:
    return Reading(
        residual=residual,
        place=place,
        value=(ratio[0] / ratio[1]).tolist(),
        limit=c.limit(residual, dtype, length, size),
        floor=c.floor(residual, dtype, length, size),
        direction=direction,
        spread=spread,
    )


@cache
def _bytes() -> Tensor:
    """The first 400 sources, one after the other."""
    paths = sources(Path(sysconfig.get_paths()["stdlib"]))[:400]
    data = [numpy.frombuffer(p.read_bytes(), dtype=numpy.uint8) for p in paths]
    end = numpy.array([END_OF_DOCUMENT], dtype=numpy.uint8)
    return torch.from_numpy(numpy.concatenate([x for d in data for x in (d, end)]))


class Text:
    """Batches of byte-level text, the same for the same seed."""

    def __init__(self, length: int, sequences: int, seed: int) -> None:
        self._data = _bytes()
        self._shape = (length, sequences)
        self._random = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets [S, B]."""
        length, sequences = self._shape
        at = torch.randint(len(self._data) - length, (sequences,), generator=self._random)
        rows = torch.stack([self._data[i : i + length + 1] for i in at.tolist()], dim=1).long()
        return rows[:-1], rows[1:]


class Training:
    """The model, its AdamW (lr 1e-3, clip 1, 50 steps of warm-up) and its data."""

    def __init__(self, length: int = 128, sequences: int = 8, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        self.text = Text(length, sequences, seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.steps = 0
        self.gradient_norm = float("nan")

    def step(self, sample: bool = False) -> tuple[float, Seen]:
        """One step; returns loss and, where sampled, what was seen."""
        self.model.seen = {} if sample else None
        loss = self.model(*self.text.batch())
        self.optimizer.zero_grad()
        loss.backward()
        seen = self.model.seen or {}
        self.model.seen = None
        norm_ = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.gradient_norm = norm_.item()
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (self.steps + 1) / 50)
        self.optimizer.step()
        self.steps += 1
        return loss.item(), seen
