"""Attention activity: how large the logits are and how widely a query looks, per head.

A head whose logits grow without bound (beyond 100 QK-clip acts, Kimi K2; beyond 1e4 runs diverged,
arXiv 2309.14322) attends to one key: its entropy −Σ A ln A drops sharply (arXiv 2303.06296).

Shape names: ``S`` positions of a sequence, ``B`` sequences, ``H`` query heads, ``G`` key heads,
``d`` head dimension, ``n`` sampled queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Logits held at once, in elements: 64 MB of float32.
_PIECE = 2**24


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


@torch.no_grad()
def attention_activity(
    query: Tensor, key: Tensor, *, scale: float, queries: int, causal: bool = True
) -> Activity:
    """Largest logit and entropy of the attention of some queries to all keys.

    Args:
        query: [S, B, H, d], as it enters the product, after rotary embedding and norms.
        key: [S, B, G, d]; query head h uses key head h // (H / G).
        scale: factor on the logits, 1/√d as a rule.
        queries: how many queries of a sequence are looked at; exact where S is not larger.
        causal: query i attends to keys up to i; else to all.

    Returns:
        Sums over the B sequences. Work and memory: B·H·n·S logits, in pieces of sequences; never
        S × S for S > n.
    """
    length, batch, heads, d = query.shape
    groups = key.shape[2]
    chosen = sampled_positions(length, queries)
    rows = query[chosen]
    n = rows.shape[0]
    barred = None
    if causal:
        positions = torch.arange(length, device=query.device)
        barred = positions > positions[chosen, None]  # [n, S]
    per_piece = max(1, _PIECE // (heads * n * length))
    largest = torch.zeros(heads, device=query.device)
    entropy = torch.zeros(heads, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, batch, per_piece):
            piece = slice(start, start + per_piece)
            q = rows[:, piece].float().mul(scale).unflatten(2, (groups, -1))  # [n, b, G, R, d]
            q = q.permute(1, 2, 3, 0, 4).flatten(2, 3)  # [b, G, R·n, d]
            k = key[:, piece].float().permute(1, 2, 3, 0)  # [b, G, d, S]
            logits = (q @ k).unflatten(2, (-1, n))  # [b, G, R, n, S]
            if barred is not None:
                logits.masked_fill_(barred, -torch.inf)
            top = logits.amax(-1)  # [b, G, R, n]
            largest += top.amax(-1).flatten(1).sum(0)
            entropy += _entropy(logits, top).mean(-1).flatten(1).sum(0)
    return Activity(largest, entropy)


def _entropy(logits: Tensor, top: Tensor) -> Tensor:
    """−Σ p ln p of softmax(logits) over the last dimension; overwrites ``logits``."""
    shifted = logits.sub_(top.unsqueeze(-1))
    weights = shifted.exp()
    total = weights.sum(-1)
    # barred keys have weight 0 and −∞ as logit
    weighted = (weights * shifted.clamp_(min=torch.finfo(shifted.dtype).min)).sum(-1)
    return total.log() - weighted / total
