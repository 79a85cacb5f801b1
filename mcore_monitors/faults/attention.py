"""A faulty attention kernel for drills and benchmarks: right output, biased gradient.

In attention's backward pass dS = P∘(dP − δ) with δ_i = rowsum(dO∘O). Low-precision flash attention
gets δ wrong, by a small amount of the same sign step after step (arXiv 2510.04212), which adds up
to a low-rank drift of W_q and W_k. The injector here does that with one dial.

Shape names as in :mod:`mcore_monitors.hosts.safe_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..hosts.safe_attention import (
    check_shapes,
    group_queries,
    key_range,
    probabilities,
    ungroup,
    widened,
)

#: Queries worked on at a time; up to here the probabilities are kept for the backward pass, above
#: it they are computed again block by block.
_BLOCK = 512


def attention_row_term(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    strength: float,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention whose backward pass takes δ + strength·mean|δ| for δ; the output is exact.

    Args:
        query: [S, B, H, d]; the layout of Megatron's core attention.
        key: [T, B, G, d]; H a multiple of G, query head h uses key head h // (H / G).
        value: [T, B, G, v].
        scale: factor on the logits, 1/√d as a rule.
        strength: the dial; the mean runs over the rows of one head and one sequence. 0 gives
            right gradients; .003 ruins a small training within a thousand steps, .01 within a
            hundred, .0003 never.
        causal: query i attends to keys up to i; needs S = T.
        mask: bool, **True = barred** (Megatron's sense), broadcastable to [B, H, S, T].

    Returns:
        [S, B, H, v] in the query's format. Worked on in float32 (float64 stays), whatever the
        format of the inputs. Dropout of probabilities is not offered.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_shapes(query, key, value, causal)
    return _AttentionRowTerm.apply(query, key, value, scale, strength, causal, mask)


class _AttentionRowTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        strength: float,
        causal: bool,
        mask: Tensor | None,
    ) -> Tensor:
        length, batch, heads, _ = query.shape
        outputs, p = [], None
        with torch.autocast(query.device.type, enabled=False):
            for first in range(0, length, _BLOCK):
                rows = query[first : first + _BLOCK]
                n = rows.shape[0]
                low, high = key_range(first, n, key.shape[0], causal, None)
                q = group_queries(rows, key.shape[2])
                k, v = widened(key[low:high]), widened(value[low:high])
                p = probabilities(q, k, n, first, low, scale, causal, mask, None).flatten(0, 1)
                context = p @ v.flatten(1, 2).transpose(0, 1)
                outputs.append(ungroup(context, n, batch, heads))
        exact = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        # δ is formed from the unrounded output: the only error of this kernel is the dialled one.
        ctx.save_for_backward(query, key, value, mask, exact, p if length <= _BLOCK else None)
        ctx.setting = (scale, strength, causal)
        return exact.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        query, key, value, mask, exact, kept = ctx.saved_tensors
        scale, strength, causal = ctx.setting
        groups = key.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            grad = widened(grad_output)
            delta = (grad * exact).sum(-1, keepdim=True)
            # The mean is one head's over one sequence, which no parallelism splits: the same
            # fault whatever the layout.
            delta = delta + strength * delta.abs().mean(0, keepdim=True)
            wide_k, wide_v = widened(key), widened(value)
            dq = torch.empty_like(query)
            dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
            for first in range(0, query.shape[0], _BLOCK):
                rows = slice(first, first + _BLOCK)
                n, batch, heads, _ = query[rows].shape
                low, high = key_range(first, n, key.shape[0], causal, None)
                q = group_queries(query[rows], groups)
                k, v = wide_k[low:high], wide_v[low:high]
                p = kept
                if p is None:
                    p = probabilities(q, k, n, first, low, scale, causal, mask, None).flatten(0, 1)
                do = group_queries(grad[rows], groups)
                ds = torch.baddbmm(
                    group_queries(delta[rows], groups),
                    do,
                    v.flatten(1, 2).permute(1, 2, 0),
                    beta=-1,
                )
                ds = ds.mul_(p).mul_(scale)
                dq[rows] = ungroup(ds @ k.flatten(1, 2).transpose(0, 1), n, batch, heads)
                dk[low:high] += (ds.mT @ q).transpose(0, 1).unflatten(1, (batch, groups))
                dv[low:high] += (p.mT @ do).transpose(0, 1).unflatten(1, (batch, groups))
        return dq, dk.to(key.dtype), dv.to(value.dtype), None, None, None, None
