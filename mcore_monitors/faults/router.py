"""A router whose gradient loses one expert's column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LostColumn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, expert: int) -> Tensor:
        ctx.expert = expert
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[..., ctx.expert] = 0
        return grad, None


def lose_column(logits: Tensor, expert: int) -> Tensor:
    """The logits [..., E] as they are; their gradient comes back without one expert's column.

    Put it behind the point where the gradient is watched: between the logits and the scores.
    """
    return _LostColumn.apply(logits, expert)
