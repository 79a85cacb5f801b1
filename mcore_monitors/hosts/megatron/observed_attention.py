"""Megatron's core attention with a place for a tap and a choice of kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...monitors.base import StepState
from ...views import AttentionCall
from .observed import named

#: (module, query, key, value, the host's other arguments) -> context [S, B, H·d]
AttentionKernel = Callable[..., torch.Tensor]


class AttentionTap:
    """What an observed core attention tells, and which kernel it runs.

    Attributes:
        listeners: each is called with every micro-batch of a sampled step.
        safe: the remedy: run this kernel instead of the host's, or None.
        faulty: a drill: run this kernel instead of the host's from ``faulty_from`` on, or None.
    """

    def __init__(self, state: StepState) -> None:
        self._state = state
        self.listeners: list[Callable[[AttentionCall], None]] = []
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

    def watches(self) -> bool:
        """Whether the call in progress is to be told.

        On sampled steps only; nothing is kept alive on the others. What is recomputed runs its
        forward twice, first without grad and not told, so that every micro-batch is counted once.
        """
        return bool(self.listeners) and self._state.armed and torch.is_grad_enabled()

    def tell(self, call: AttentionCall) -> None:
        """Hand one micro-batch to every listener."""
        for listener in self.listeners:
            listener(call)


@cache
def observed_attention(parent: type) -> type:
    """Subclass of a Megatron core-attention class that tells a tap what crosses its border."""

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
            kernel = tap.kernel()
            if kernel is None:
                output = super().forward(query, key, value, *args, **kwargs)
            else:
                output = kernel(self, query, key, value, *args, **kwargs)
            if self.training and tap.watches():
                tap.tell(
                    AttentionCall(
                        query=query,
                        key=key,
                        value=value,
                        output=output,
                        heads=query.shape[-2],
                        groups=key.shape[-2],
                        layout="sbhd" if query.dim() == 4 else "thd",
                        packed=kwargs.get("packed_seq_params"),
                    )
                )
            return output

    return named(Observed, parent)
