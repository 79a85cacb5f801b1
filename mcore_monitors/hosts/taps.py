"""Taps: what an observed module tells, and to whom; the same on every host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..monitors.base import StepState
from ..views import AttentionCall

#: (module, query, key, value, the host's other arguments) -> the host's output
AttentionKernel = Callable[..., torch.Tensor]


class RouterTap:
    """What an observed router tells, and to whom.

    Attributes:
        listeners: each is called with (logits [..., E], padding mask or None) of every micro-batch
            of training. The logits are those of the graph, so a listener may hook their gradient.
            Where ``tells_choice``, the keyword ``routing_map`` [..., E] says where tokens go.
        tells_choice: hand the host's choice over, too; for hosts that choose by more than scores.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[..., None]] = []
        self.tells_choice = False

    def tell(
        self,
        logits: torch.Tensor,
        padding: torch.Tensor | None,
        routing_map: torch.Tensor | None = None,
    ) -> None:
        """Hand the logits of one micro-batch to every listener."""
        choice = {"routing_map": routing_map} if self.tells_choice else {}
        for listener in self.listeners:
            listener(logits, padding, **choice)


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
