"""What crosses a kernel's border in one micro-batch, until every gradient has come back.

Gradients arrive at different times of the backward pass. Whatever the residuals need is held, as
tensors without a graph, until the last of it is there; then their terms are taken and the tensors
are let go. Nothing else refers to a border but the hooks on its own tensors: where a
gradient never comes it goes with the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...calls import AttentionCall, NormCall, arranged
from ...signals.conservation import (
    key_shift_all_terms,
    query_key_terms,
    value_output_terms,
)
from .parts import watch_parts
from .terms import Terms

#: wraps a hook so that an error in it turns the monitor off and never reaches the host
Guard = Callable[[Callable[..., None]], Callable[..., None]]
#: takes in (signal, terms)
Deliver = Callable[[str, Terms], None]

def _key_shift(dk: torch.Tensor, q: torch.Tensor, o: torch.Tensor, do: torch.Tensor) -> Terms:
    """The key shift's terms and, [B, G, 2, d], the directions that a wrong row term has."""
    signed, scale, directions = key_shift_all_terms(dk, q, o, do)
    return signed, scale, directions.movedim(0, 2)


#: residual to what makes its terms, and of which tensors
_ATTENTION: dict[str, tuple[Callable[..., Terms], tuple[str, ...]]] = {
    "attention/key_shift": (_key_shift, ("dk", "q", "o", "do")),
    "attention/value_output": (value_output_terms, ("v", "dv", "o", "do")),
    "attention/query_key": (query_key_terms, ("q", "dq", "k", "dk")),
}


def bare(gradient: torch.Tensor) -> torch.Tensor:
    """What a hook got, without a graph: it only has one where the host differentiates twice."""
    return gradient.detach() if gradient.requires_grad else gradient


class AttentionBorder:
    """Q, K, V and O of one call of an attention kernel, and their gradients as they come.

    When the last gradient is there all residuals are taken at once: the second and third find the
    code of the first in the processor's caches. An identity holds for each sequence by itself, so
    some of them do.

    Args:
        call: the tensors of the graph.
        some: residual to the sequences that it is taken of.
        deliver: called with the terms of each, [B, G, ...].
        guard: wraps the hooks.
    """

    def __init__(
        self,
        call: AttentionCall,
        some: dict[str, slice],
        deliver: Deliver,
        guard: Guard,
    ) -> None:
        self._deliver, self._layout, self._some = deliver, call.layout, some
        #: tensors with their heads
        self._have: dict[str, tuple[torch.Tensor, int]] = {}
        self._missing: set[str] = set()
        needed = {name for signal in some for name in _ATTENTION[signal][1]}
        for name, x, heads in (
            ("q", call.query, call.heads),
            ("k", call.key, call.groups),
            ("v", call.value, call.groups),
            ("o", call.output, call.heads),
        ):
            if name in needed:
                self._have[name] = x.data, heads  # in half the time of ``detach``
            if f"d{name}" in needed and x.requires_grad:
                self._missing.add(f"d{name}")
                # not a word of ``call`` in the hook: it holds the graph, which holds the hook
                x.register_hook(guard(partial(self._arrived, f"d{name}", heads)))

    def _arrived(self, name: str, heads: int, gradient: torch.Tensor) -> None:
        if name not in self._missing:
            return  # a second backward pass
        self._missing.remove(name)
        self._have[name] = bare(gradient), heads
        if not self._missing:
            self._take()

    def _take(self) -> None:
        have = {n: _close(arranged(x, heads, self._layout)) for n, (x, heads) in self._have.items()}
        self._have.clear()
        for signal, some in self._some.items():
            terms, names = _ATTENTION[signal]
            if have.keys() >= set(names):
                self._deliver(signal, terms(*(_cut(have[name], some) for name in names)))


def _close(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its channels next to each other.

    An unfused attention leaves those of dK far apart, and to take their norm there is ten times as
    much work as to bring them together.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def _cut(x: torch.Tensor, some: slice) -> torch.Tensor:
    return x if some == slice(None) else x[:, some]


class NormBorder:
    """Input and output of one call of a norm, and their gradients as they come.

    Each token is a test by itself, so some of them do.

    Args:
        call: the tensors of the graph, with as many tokens as there are.
        some: which positions of a dimension are looked at, of how many tokens and positions.
        deliver: called with a copy of x, dx, y, dy of these tokens, [4, ..., D].
        guard: wraps the hooks.
    """

    def __init__(
        self,
        call: NormCall,
        some: Callable[[int, int], slice],
        deliver: Callable[[torch.Tensor], None],
        guard: Guard,
    ) -> None:
        if not (call.x.requires_grad and call.y.requires_grad):
            return
        self._deliver = deliver
        tokens = call.x.shape[:-1]
        longest = max(tokens, default=1)
        at = tokens.index(longest) if tokens else 0
        self._taken = (slice(None),) * at + (some(tokens.numel(), longest),) if tokens else ()
        self._x, self._y = call.x.data, call.y.data
        self._dx = self._dy = None
        self._parts = watch_parts(call.x, call.y, guard(self._on_part))
        call.y.register_hook(guard(self._on_output))

    def _on_output(self, gradient: torch.Tensor) -> None:
        self._dy = bare(gradient)

    def _on_part(self, gradient: torch.Tensor) -> None:
        """Add a part of the input's gradient; what came is the engine's, which may write to it."""
        part = bare(gradient)[self._taken]
        self._parts -= 1
        if self._parts < 0:
            return  # a second backward pass
        if self._parts:
            self._dx = part.clone() if self._dx is None else self._dx.add_(part)
            return
        dx = part if self._dx is None else self._dx.add_(part)
        x, y, dy = (t[self._taken] for t in (self._x, self._y, self._dy))
        # a copy: what waits for other norms must not keep whole activations alive
        self._deliver(torch.stack([x, dx, y, dy]))
        self._x = self._y = self._dx = self._dy = None
