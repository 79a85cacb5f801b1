"""Attention written out, with what may or may not keep an identity, and its residuals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mcore_monitors.signals import conservation as c

S, B, H, G, d = 48, 3, 4, 2, 16
SCALE = d**-0.5


def inputs(
    dtype: torch.dtype = torch.float64,
    length: int = S,
    groups: int = G,
    logits: float = 1.0,
    common: float = 0.0,
    value_dim: int = d,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random Q, K, V and dO, [S, B, heads, channels]; ``common`` is a part all queries share."""
    g = torch.Generator().manual_seed(0)
    shapes = ((H, d), (groups, d), (groups, value_dim), (H, value_dim))
    q, k, v, grad = (torch.randn(length, B, *n, generator=g, dtype=torch.float64) for n in shapes)
    q = logits * (q + common * torch.randn(1, B, H, d, generator=g, dtype=torch.float64))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    return q, k, v, grad.to(dtype)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | float = 0.0,
    keep: Tensor | float = 1.0,
    sink: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal attention [S, B, H, v] with a bias, kept probabilities, a sink or a soft cap."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("ibhd,jbhd->bhij", q, k) * SCALE
    if cap is not None:
        s = cap * torch.tanh(s / cap)
    s = s + bias + torch.full(s.shape[-2:], float("-inf"), dtype=s.dtype).triu(1)
    if sink is not None:
        s = torch.cat([s, torch.full_like(s[..., :1], sink)], dim=-1)
    p = s.softmax(-1)[..., : k.shape[0]] * keep
    return torch.einsum("bhij,jbhd->ibhd", p, v)


def extras() -> dict[str, dict[str, Tensor]]:
    """What a right attention may have besides: name → arguments of :func:`dense`."""
    g = torch.Generator().manual_seed(1)
    distance = (torch.arange(S)[None, :] - torch.arange(S)[:, None]).double()
    window = torch.zeros(S, S, dtype=torch.float64).masked_fill(distance < -12, float("-inf"))
    documents = torch.zeros(S, S, dtype=torch.float64)
    documents[S // 2 :, : S // 2] = float("-inf")
    padding = torch.zeros(B, 1, 1, S, dtype=torch.float64)
    padding[1, ..., S - 9 :] = -1e30
    return {
        "causal": {},
        "position bias": {"bias": -0.1 * distance.abs()},
        "sliding window": {"bias": window},
        "packed documents": {"bias": documents},
        "padding": {"bias": padding},
        "dropout": {"keep": (torch.rand(B, H, S, S, generator=g) > 0.2).double() / 0.8},
    }


def residuals(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    calls: int = 1,
) -> dict[str, Tensor]:
    """Mean over sequences of the three attention residuals, [G] each, at the last of the calls."""
    for call in range(calls):  # a stale fault needs a call before, with another gradient
        do = grad if call == calls - 1 else grad.roll(1, 0)
        o = attention(q, k, v)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    q, k, v, o = (x.detach() for x in (q, k, v, o))
    found = {
        "key_shift": c.key_shift_from_terms(
            *c.key_shift_terms(dk, query=q, output=o, grad_output=do, softmax_scale=SCALE)
        ),
        "value_output": c.value_output_from_terms(*c.value_output_terms(v, dv, o, do)),
        "query_key": c.query_key_from_terms(*c.query_key_terms(q, dq, k, dk)),
    }
    return {name: total / count for name, (total, count) in found.items()}
