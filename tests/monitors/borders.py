"""Calls of kernels whose tensors and gradients are known: what a tap would hand to a monitor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mcore_monitors.calls import AttentionCall
from mcore_monitors.faults.attention import attention_row_term
from mcore_monitors.monitors.conservation import ConservationMonitor

#: names of what crosses the border of an attention, and of its gradients
TENSORS = ("q", "k", "v", "o")


def attention(
    *,
    length: int = 8,
    batch: int = 3,
    heads: int = 4,
    groups: int = 2,
    channels: int = 4,
    strength: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Q, K, V, O and dq, dk, dv, do of one call, [S, B, heads, d]; ``strength`` of its fault."""
    generator = torch.Generator().manual_seed(seed)
    # queries with a common part, as in a trained model: a wrong row term shows along it
    q, k, v = (
        (torch.randn(length, batch, n, channels, generator=generator) + shift).to(dtype)
        for n, shift in ((heads, 0.5), (groups, 0.0), (groups, 0.0))
    )
    grad = (torch.randn(length, batch, heads, channels, generator=generator)).to(dtype)
    for x in (q, k, v):
        x.requires_grad_()
    o = attention_row_term(q, k, v, scale=channels**-0.5, strength=strength)
    gradients = torch.autograd.grad(o, (q, k, v), grad)
    parts = {"q": q, "k": k, "v": v, "o": o} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return {name: x.detach() for name, x in parts.items()} | {"do": grad}


def cut(parts: Mapping[str, torch.Tensor], pick: Callable[[torch.Tensor], torch.Tensor]):
    """A part of a call: the same slice of all its tensors."""
    return {name: pick(x) for name, x in parts.items()}


def cross(
    monitor: ConservationMonitor,
    layer: int,
    parts: Mapping[str, torch.Tensor],
    *,
    layout: str = "sbhd",
    order: tuple[str, ...] = ("o", "v", "k", "q"),
) -> None:
    """Let a call cross the border: forward, then its gradients one after the other.

    What is not in ``order`` wants no gradient.
    """
    arranged = {n: _as(layout, x) for n, x in parts.items()}
    tensors = {n: arranged[n].clone().requires_grad_(n in order) for n in TENSORS}
    # what a host hands over is part of a graph, not a leaf
    inner = {n: x * 1 for n, x in tensors.items()}
    monitor.on_attention(
        layer,
        AttentionCall(
            query=inner["q"],
            key=inner["k"],
            value=inner["v"],
            output=inner["o"],
            heads=parts["q"].shape[2],
            groups=parts["k"].shape[2],
            layout=layout,
        ),
    )
    for name in order:
        inner[name].backward(arranged[f"d{name}"])


def _as(layout: str, x: torch.Tensor) -> torch.Tensor:
    if layout == "bhsd":
        return x.permute(1, 2, 0, 3)
    if layout == "bshd":
        return x.transpose(0, 1).flatten(2)
    return x.squeeze(1) if layout == "thd" else x
