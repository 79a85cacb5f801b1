"""Attention activity: how large the logits are and how widely a query looks, per head.

A head whose logits grow without bound (beyond 100 QK-clip acts, Kimi K2; beyond 1e4 runs diverged,
arXiv 2309.14322) attends to one key: its entropy −Σ A ln A drops sharply (arXiv 2303.06296).

Shape names: ``S`` positions of a sequence, ``B`` sequences, ``H`` query heads, ``G`` key heads,
``R`` = H / G query heads of a key head, ``d`` head dimension, ``n`` sampled queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Logits held at once, in elements: 64 MB of float32.
_PIECE = 2**24
#: Logit of a key that a query may not attend to.
_BARRED = -1e30
#: Least logit beside the largest: a weight of 1.6e-38, which is nothing, and a CPU takes several
#: times as long for an exponential that underflows.
_LEAST = -87.0


class Activity(NamedTuple):
    """Sums over the sequences at hand, per query head [H], float32."""

    max_logit: Tensor
    """Sum over sequences of the largest logit that a sampled query has with an allowed key."""
    entropy: Tensor
    """Sum over sequences of the mean entropy of the sampled queries' attention, nats."""


def sampled_positions(length: int, queries: int) -> slice:
    """At most ``queries`` positions of a sequence, evenly spaced, the last one among them.

    All positions where the sequence is no longer than that.
    """
    stride = -(-length // queries)
    return slice((length - 1) % stride, length, stride)


def causal_bias(length: int, queries: int, device: torch.device) -> Tensor:
    """What the mask adds to the logits of the sampled queries: 0, or −1e30 for later keys.

    Returns:
        [n, S] float32.
    """
    positions = torch.arange(length, device=device)
    later = positions > positions[sampled_positions(length, queries), None]
    return torch.zeros(later.shape, device=device).masked_fill_(later, _BARRED)


@torch.no_grad()
def attention_activity(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    queries: int,
    causal: bool = True,
    bias: Tensor | None = None,
) -> Activity:
    """Largest logit and entropy of the attention of some queries to all keys.

    Args:
        query: [S, B, H, d], as it enters the product, after rotary embedding and norms.
        key: [S, B, G, d]; query head h uses key head h // (H / G).
        scale: factor on the logits, 1/√d as a rule.
        queries: how many queries of a sequence are looked at; exact where S is not larger.
        causal: query i attends to keys up to i; else to all.
        bias: what :func:`causal_bias` gives, by who has it already.

    Returns:
        Sums over the B sequences. Work and memory: B·H·n·S logits, in pieces of sequences; never
        S × S for S > n.
    """
    length, batch, heads, d = query.shape
    groups = key.shape[2]
    rows = query[sampled_positions(length, queries)]
    n = rows.shape[0]
    if not causal:
        bias = torch.zeros(n, length, device=query.device)
    elif bias is None:
        bias = causal_bias(length, queries, query.device)
    bias = bias.expand(heads // groups, -1, -1).reshape(-1, length)  # [R·n, S]
    per_piece = max(1, _PIECE // (heads * n * length))
    found = [
        _of_piece(rows[:, i : i + per_piece], key[:, i : i + per_piece], bias, scale)
        for i in range(0, batch, per_piece)
    ]
    if len(found) == 1:
        return found[0]
    return Activity(*(torch.stack(parts).sum(0) for parts in zip(*found, strict=True)))


def _of_piece(rows: Tensor, key: Tensor, bias: Tensor, scale: float) -> Activity:
    """Sums over sequences: rows [n, B, H, d], key [S, B, G, d], bias [R·n, S]."""
    n, batch, heads, d = rows.shape
    groups = key.shape[2]
    with torch.autocast(rows.device.type, enabled=False):
        q = rows.float().unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4)  # [B, G, R, n, d]
        q = q.reshape(batch * groups, -1, d)
        k = key.float().flatten(1, 2).permute(1, 2, 0)  # [B·G, d, S], mostly without a copy
        logits = torch.baddbmm(bias, q, k, alpha=scale)  # [B·G, R·n, S]
        top = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(top).clamp_min_(_LEAST)
        weights = shifted.exp()
        total = weights.sum(-1)
        # −Σ p ln p with p = w/t
        entropy = total.log() - weights.mul_(shifted).sum(-1) / total
        # a head's rows are those of its own n queries
        largest = top.view(batch, heads, n).amax(-1).sum(0)
        return Activity(largest, entropy.view(batch, heads, n).mean(-1).sum(0))
