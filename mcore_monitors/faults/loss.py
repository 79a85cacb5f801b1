"""Vocabulary-parallel cross-entropy, written out in one process, that leaves out a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, shards: int, lost: int | None) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = z - z.amax(-1, keepdim=True)
        exp = z.exp()
        parts = exp.unflatten(-1, (shards, -1)).sum(-1)
        if lost is not None:
            parts = parts.clone()
            parts[..., lost] = 0
        total = parts.sum(-1, keepdim=True)
        ctx.save_for_backward(exp / total, target)
        ctx.format = logits.dtype
        return total.squeeze(-1).log() - z.gather(-1, target.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        p, target = ctx.saved_tensors
        gradient = p.scatter_add(
            -1, target.unsqueeze(-1), torch.full_like(p[..., :1], -1.0)
        ) * grad.unsqueeze(-1)
        return gradient.to(ctx.format), None, None, None


def sharded_cross_entropy(
    logits: Tensor, target: Tensor, *, shards: int, lost: int | None = None
) -> Tensor:
    """Cross-entropy per token with Σ exp reduced over shards; ``lost`` is left out of the sum.

    Args:
        logits: [..., V], V a multiple of ``shards``.
        target: [...] int64.
        lost: number of the shard whose part of Σ_v exp never arrives; None for a right loss.

    Returns:
        [...] float32 (float64 for float64 logits).
    """
    return _ShardedCrossEntropy.apply(logits, target, shards, lost)
