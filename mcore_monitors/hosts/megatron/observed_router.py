"""Megatron's router with a place for a tap."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..taps import RouterTap
from .observed import named


@cache
def observed_router(parent: type) -> type:
    """Subclass of a Megatron router class that hands its logits, and its choice, to a tap."""

    class Observed(parent):
        mcore_monitors_tap: RouterTap | None = None

        def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            tap = self.mcore_monitors_tap
            routed = super().routing(logits, *args, **kwargs)
            # Evaluation doesn't count, and a recomputed layer's first pass runs without grad.
            if tap is not None and self.training and torch.is_grad_enabled():
                padding = kwargs.get("padding_mask", args[0] if args else None)
                tap.tell(logits, padding, routed[1] if tap.tells_choice else None)
            return routed

    return named(Observed, parent)
