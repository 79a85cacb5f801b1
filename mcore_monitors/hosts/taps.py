"""Taps: what an observed module tells, and to whom; the same on every host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..monitors.base import StepState

#: (module, query, key, value, the host's other arguments) -> the host's output
AttentionKernel = Callable[..., torch.Tensor]


class Passes:
    """Tells the forward pass that counts from its recomputation, so each micro-batch counts once.

    Outside of a backward pass a forward counts if gradients are on. Inside, where a checkpointed
    layer is computed again, it counts only if its first pass did not: with reentrant checkpointing
    the first pass runs without gradients, with the non-reentrant kind it is part of the graph, and
    what the second gives never sees a gradient.
    """

    def __init__(self, state: StepState) -> None:
        self._state = state
        self._iteration, self._silent = -1, 0

    def counts(self) -> bool:
        """Whether the forward pass in progress is to be told; asked once for each."""
        if self._state.iteration != self._iteration:
            self._iteration, self._silent = self._state.iteration, 0
        if torch._C._current_graph_task_id() == -1:  # no backward pass is running
            if torch.is_grad_enabled():
                return True
            self._silent += 1
            return False
        if not torch.is_grad_enabled() or not self._silent:
            return False
        self._silent -= 1
        return True


class Tap:
    """What an observed module tells of the micro-batches of sampled steps.

    Attributes:
        listeners: each is called with whatever crosses the border.
    """

    def __init__(self, state: StepState) -> None:
        self._state = state
        self._passes = Passes(state)
        self.listeners: list[Callable[..., None]] = []

    def watches(self) -> bool:
        """Whether the call in progress is to be told.

        On sampled steps only; nothing is kept alive on the others. What is recomputed runs its
        forward twice and is told once. To be asked once a call.
        """
        return bool(self.listeners) and self._state.armed and self._passes.counts()

    def tell(self, *what: object) -> None:
        """Hand one micro-batch to every listener."""
        for listener in self.listeners:
            listener(*what)


class RouterTap:
    """What an observed router tells, and to whom.

    Attributes:
        listeners: each is called with (logits [..., E], padding mask or None) of every micro-batch
            of training. The logits are those of the graph, so a listener may hook their gradient.
            Where ``tells_choice``, the keyword ``routing_map`` [..., E] says where tokens go.
        sampled: likewise, on sampled steps only, of which ``state`` tells.
        tells_choice: hand the host's choice over, too; for hosts that choose by more than scores.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[..., None]] = []
        self.sampled: list[Callable[..., None]] = []
        self.state = StepState()
        self.tells_choice = False

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self.listeners or self.sampled)

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
        if self.state.armed:
            for listener in self.sampled:
                listener(logits, padding, **choice)


class AttentionTap(Tap):
    """What an observed core attention tells, and which kernel it runs.

    Attributes:
        listeners: each is called with an :class:`mcore_monitors.calls.AttentionCall`.
        safe: the remedy: run this kernel instead of the host's, or None.
        faulty: a drill: run this kernel instead of the host's from ``faulty_from`` on, or None.
    """

    def __init__(self, state: StepState) -> None:
        super().__init__(state)
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
