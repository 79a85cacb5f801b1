"""Attention that can be trusted: plain PyTorch in float32, to fall back on when a kernel lies.

The remedy for the diagnosis "attention numerics". Each step is one ordinary matrix product or
softmax and autograd does the backward pass, so the pieces agree with one another. Why the tie fix
for low-precision flash attention (arXiv 2510.04212) is not needed: that bias comes from
*unnormalised* bfloat16 probabilities, exactly 1 at tied row maxima, whose product with V is
rounded to bfloat16 before the division, and from a backward pass that takes δ = rowsum(dO∘O) from
the O so rounded. Here P is normalised first, P·V is summed in float32, and δ is formed from P and
dP themselves, never from the rounded output.

Shape names: ``S`` queries, ``T`` keys, ``B`` sequences, ``H`` query heads, ``G`` key heads,
``R`` = H / G, ``d`` head dimension of query and key, ``v`` of the value, ``n`` queries in a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Added to barred logits. Finite, so that a query that may attend to nothing makes no 0/0.
_BARRED = -1e30


def safe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    dropout: float = 0.0,
    block: int = 512,
) -> Tensor:
    """softmax(scale·QKᵀ) V in float32, blocked over queries, differentiable.

    Args:
        query: [S, B, H, d]; the layout of Megatron's core attention.
        key: [T, B, G, d]; H a multiple of G, query head h uses key head h // (H / G).
        value: [T, B, G, v].
        scale: factor on the logits, 1/√d as a rule.
        causal: query i attends to keys up to i; needs S = T.
        mask: bool, **True = barred** (Megatron's sense), broadcastable to [B, H, S, T]. A query
            with every key barred gets zeros.
        window: (left, right), query i attends to keys i − left to i + right; −1 = no bound.
        dropout: probability of dropping an attention probability, from the default generator.
        block: queries worked on at a time. Above it, each block is computed again in the backward
            pass, so that only [B, H, block, T] is held at once.

    Returns:
        [S, B, H, v] in the query's format. float16 and bfloat16 are widened to float32 (float64
        stays) and rounded once at the end, gradients likewise. On CUDA, float32 products follow
        ``torch.get_float32_matmul_precision()``: leave it at "highest" for this remedy.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_shapes(query, key, value, causal)
    length = query.shape[0]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    outputs = []
    for first in range(0, length, block):
        args = (query[first : first + block], key, value, first, scale, causal, mask, window)
        if length > block and training:
            outputs.append(
                checkpoint(
                    _block, *args, dropout, use_reentrant=False, preserve_rng_state=dropout > 0
                )
            )
        else:
            outputs.append(_block(*args, dropout))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: int,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    window: tuple[int, int] | None,
    dropout: float,
) -> Tensor:
    n, batch, heads, _ = query.shape
    # Under autocast even float32 matrix products would run in bfloat16.
    with torch.autocast(query.device.type, enabled=False):
        low, high = key_range(first, n, key.shape[0], causal, window)
        key, value = widened(key[low:high]), widened(value[low:high])
        q = group_queries(query, key.shape[2])
        p = probabilities(q, key, n, first, low, scale, causal, mask, window)
        if dropout:
            p = F.dropout(p, dropout)
        context = p.flatten(0, 1) @ value.flatten(1, 2).transpose(0, 1)
        return ungroup(context, n, batch, heads).to(query.dtype)


def check_shapes(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    """Raise a ValueError that says which shapes do not fit."""
    q, k, v = (tuple(x.shape) for x in (query, key, value))
    if len(q) != 4 or len(k) != 4 or k[:3] != v[:3] or q[1] != k[1] or q[3] != k[3] or q[2] % k[2]:
        raise ValueError(
            "attention needs query [S, B, H, d], key [T, B, G, d] and value [T, B, G, v] with H a "
            f"multiple of G; got query {q}, key {k}, value {v}"
        )
    if causal and q[0] != k[0]:
        raise ValueError(f"causal attention needs as many keys as queries; got {k[0]} and {q[0]}")


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def group_queries(x: Tensor, groups: int) -> Tensor:
    """[n, B, H, d] to [B·G, R·n, d]: the query heads of a group stacked on one another.

    Stacked queries meet their key in one product, so keys and values are never repeated.
    """
    n, batch, heads, d = x.shape
    x = widened(x).reshape(n, batch * groups, heads // groups, d)
    return x.permute(1, 2, 0, 3).flatten(1, 2)


def ungroup(x: Tensor, n: int, batch: int, heads: int) -> Tensor:
    """[B·G, R·n, v] back to [n, B, H, v]."""
    return x.view(batch * heads, n, -1).transpose(0, 1).reshape(n, batch, heads, -1)


def key_range(
    first: int, n: int, keys: int, causal: bool, window: tuple[int, int] | None
) -> tuple[int, int]:
    """The keys that some query of the block first .. first + n − 1 can attend to, [low, high)."""
    left, right = window or (-1, -1)
    high = keys
    if causal:
        high = min(high, first + n)
    if right >= 0:
        high = min(high, first + n + right)
    low = max(0, first - left) if left >= 0 else 0
    return min(low, high - 1), high


def probabilities(
    query: Tensor,
    key: Tensor,
    n: int,
    first: int,
    low: int,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    window: tuple[int, int] | None,
) -> Tensor:
    """Attention probabilities of a block of n queries, [B, G, R·n, t].

    Args:
        query: [B·G, R·n, d] of :func:`group_queries`.
        key: [t, B, G, d], keys number ``low`` to ``low + t`` of the sequence.
        first: number of the block's first query.
    """
    t, batch, groups, _ = key.shape
    keys = key.flatten(1, 2).permute(1, 2, 0)
    barred = _barred_by_position(first, n, low, t, causal, window, query.device)
    if barred is None:
        scores = (query * scale) @ keys
    else:
        bias = torch.zeros_like(barred, dtype=query.dtype).masked_fill_(barred, _BARRED)
        scores = torch.baddbmm(bias.repeat(query.shape[1] // n, 1), query, keys, alpha=scale)
    scores = scores.unflatten(0, (batch, groups))
    if mask is None and window is None:
        return scores.softmax(-1)
    if mask is not None:
        scores = scores.unflatten(2, (-1, n))
        scores = scores.masked_fill(_mask_block(mask, first, n, low, t, groups), _BARRED)
        scores = scores.flatten(2, 3)
    nothing = scores.amax(-1, keepdim=True) <= _BARRED / 2
    return scores.softmax(-1).masked_fill(nothing, 0.0)


def _barred_by_position(
    first: int,
    n: int,
    low: int,
    t: int,
    causal: bool,
    window: tuple[int, int] | None,
    device: torch.device,
) -> Tensor | None:
    """[n, t] bool, True where query and key are too far apart; None where nothing is barred."""
    left, right = window or (-1, -1)
    if causal:
        right = 0
    if left < 0 and right < 0:
        return None
    queries = torch.arange(first, first + n, device=device)[:, None]
    ahead = torch.arange(low, low + t, device=device) - queries
    barred = torch.zeros_like(ahead, dtype=torch.bool)
    if right >= 0:
        barred |= ahead > right
    if left >= 0:
        barred |= ahead < -left
    return barred


def _mask_block(mask: Tensor, first: int, n: int, low: int, t: int, groups: int) -> Tensor:
    """The block's part of a mask that broadcasts to [B, H, S, T], as [B|1, G|1, R|1, n|1, t|1]."""
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    if mask.shape[2] > 1:
        mask = mask[:, :, first : first + n]
    if mask.shape[3] > 1:
        mask = mask[..., low : low + t]
    return mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (groups, -1))
