"""RMSNorm and LayerNorm whose backward pass may leave out the projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        projected: bool,
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = wide * inverse
        ctx.save_for_backward(normed, inverse, weight)
        ctx.setting = (x.dtype, centred, projected, bias is not None)
        out = normed * weight
        return (out if bias is None else out + bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, weight = ctx.saved_tensors
        fmt, centred, projected, has_bias = ctx.setting
        grad = grad.to(normed.dtype)
        scaled = grad * weight
        if centred:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        dx = scaled
        if projected:
            dx = scaled - normed * (normed * scaled).mean(-1, keepdim=True)
        tokens = tuple(range(grad.dim() - 1))
        dw = (grad * normed).sum(tokens).to(weight.dtype)
        db = grad.sum(tokens).to(weight.dtype) if has_bias else None
        return (dx * inverse).to(fmt), dw, db, None, None, None


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    centred: bool = False,
    projected: bool = True,
) -> Tensor:
    """RMSNorm (LayerNorm where ``centred``) of the last dimension.

    ``projected=False`` is the fault: dx = γ∘dy / r without the term along x̂.
    """
    return _Norm.apply(x, weight, bias, eps, centred, projected)
