"""Megatron's router with a place for a tap."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .observed import named


class RouterTap:
    """What an observed router tells, and to whom.

    Attributes:
        listeners: each is called with (logits [..., E], padding mask or None) of every micro-batch
            of training. The logits are those of the graph, so a listener may hook their gradient.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[torch.Tensor, torch.Tensor | None], None]] = []

    def tell(self, logits: torch.Tensor, padding: torch.Tensor | None) -> None:
        """Hand the logits of one micro-batch to every listener."""
        for listener in self.listeners:
            listener(logits, padding)


@cache
def observed_router(parent: type) -> type:
    """Subclass of a Megatron router class that hands its logits to a tap."""

    class Observed(parent):
        mcore_monitors_tap: RouterTap | None = None

        def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            tap = self.mcore_monitors_tap
            # Evaluation doesn't count, and a recomputed layer's first pass runs without grad.
            if tap is not None and self.training and torch.is_grad_enabled():
                tap.tell(logits, kwargs.get("padding_mask", args[0] if args else None))
            return super().routing(logits, *args, **kwargs)

    return named(Observed, parent)
