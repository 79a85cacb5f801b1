"""Megatron's router and core attention, with a place for a tap.

An observed class is a subclass made on the fly of whatever class the layer spec names, so state
dicts, checkpoints and isinstance checks stay as they were. Without a tap it does what its parent
does and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...monitors.base import StepState

#: (module, query, key, value, the host's other arguments) -> context [S, B, H·d]
AttentionKernel = Callable[..., torch.Tensor]


class RouterTap:
    """What an observed router tells, and to whom."""

    def __init__(self, on_logits: Callable[..., None]) -> None:
        self.on_logits = on_logits


class AttentionTap:
    """What an observed core attention tells, and which kernel it runs.

    Attributes:
        on_key_gradient: called with dK in the backward pass of sampled steps, or None.
        safe: the remedy: run this kernel instead of the host's, or None.
        faulty: a drill: run this kernel instead of the host's from ``faulty_from`` on, or None.
    """

    def __init__(self, state: StepState) -> None:
        self._state = state
        self.on_key_gradient: Callable[[torch.Tensor], None] | None = None
        self.safe: AttentionKernel | None = None
        self.faulty: AttentionKernel | None = None
        self.faulty_from = 0

    def kernel(self) -> AttentionKernel | None:
        """The kernel to run in the step in progress; None means the host's own."""
        if self.safe is not None:
            return self.safe
        if self.faulty is not None and self._state.iteration >= self.faulty_from:
            return self.faulty
        return None

    def watch(self, key: torch.Tensor) -> None:
        """Hook dK, on sampled steps only; nothing is kept alive on the others.

        What is recomputed runs its forward twice, first without grad and not hooked, so that every
        micro-batch is counted once.
        """
        if not self._state.armed or self.on_key_gradient is None:
            return
        if key.requires_grad and torch.is_grad_enabled():
            key.register_hook(self.on_key_gradient)


@cache
def observed_router(parent: type) -> type:
    """Subclass of a Megatron router class that hands its logits to a tap."""

    class Observed(parent):
        mcore_monitors_tap: RouterTap | None = None

        def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            tap = self.mcore_monitors_tap
            # Evaluation doesn't count, and a recomputed layer's first pass runs without grad.
            if tap is not None and self.training and torch.is_grad_enabled():
                tap.on_logits(logits, kwargs.get("padding_mask", args[0] if args else None))
            return super().routing(logits, *args, **kwargs)

    return _named(Observed, parent)


@cache
def observed_attention(parent: type) -> type:
    """Subclass of a Megatron core-attention class with a tap on dK and a choice of kernel."""

    class Observed(parent):
        mcore_monitors_tap: AttentionTap | None = None

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            tap = self.mcore_monitors_tap
            if tap is None:
                return super().forward(query, key, value, *args, **kwargs)
            if self.training:
                tap.watch(key)
            kernel = tap.kernel()
            if kernel is None:
                return super().forward(query, key, value, *args, **kwargs)
            return kernel(self, query, key, value, *args, **kwargs)

    return _named(Observed, parent)


def _named(cls: type, parent: type) -> type:
    cls.__name__ = f"Observed{parent.__name__}"
    cls.__qualname__ = cls.__name__
    cls.__doc__ = f"{parent.__name__} with a tap for mcore-monitors."
    return cls


def is_observed(module: Any) -> bool:
    """Whether a module was built from a registered spec."""
    return hasattr(type(module), "mcore_monitors_tap")
