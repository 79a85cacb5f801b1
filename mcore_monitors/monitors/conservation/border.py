"""What crosses a kernel's border in one micro-batch, until every gradient has come back.

Gradients arrive at different times of the backward pass. Whatever a residual needs is held, as
tensors without a graph, until the last of it is there; then the residual's terms are taken and the
tensors are let go. Nothing else refers to a border but the hooks on its own tensors: where a
gradient never comes it goes with the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from ...signals.conservation import (
    key_shift_all_terms,
    query_key_terms,
    value_output_terms,
)
from ...views import AttentionCall, NormCall, arranged
from .parts import watch_parts
from .terms import Terms

#: wraps a hook so that an error in it turns the monitor off and never reaches the host
Guard = Callable[[Callable[..., None]], Callable[..., None]]
#: takes in (signal, terms)
Deliver = Callable[[str, Terms], None]

def _key_shift(dk: torch.Tensor, q: torch.Tensor, o: torch.Tensor, do: torch.Tensor) -> Terms:
    """The key shift's terms and, [B, G, 2, d], the directions that a wrong row term has."""
    signed, scale, directions = key_shift_all_terms(dk, q, o, do)
    return signed, scale, directions.permute(1, 2, 0, 3)


#: residual to what makes its terms, and of which tensors
_ATTENTION: dict[str, tuple[Callable[..., Terms], tuple[str, ...]]] = {
    "attention/key_shift": (_key_shift, ("dk", "q", "o", "do")),
    "attention/value_output": (value_output_terms, ("v", "dv", "o", "do")),
    "attention/query_key": (query_key_terms, ("q", "dq", "k", "dk")),
}


@cache
def _names(signals: tuple[str, ...]) -> frozenset[str]:
    """All tensors of some residuals."""
    return frozenset(name for signal in signals for name in _ATTENTION[signal][1])


def bare(gradient: torch.Tensor) -> torch.Tensor:
    """What a hook got, without a graph: it only has one where the host differentiates twice."""
    return gradient.detach() if gradient.requires_grad else gradient


class AttentionBorder:
    """Q, K, V and O of one call of an attention kernel, and their gradients as they come.

    An identity holds for each sequence by itself, so some of them do.

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
        self._deliver, self._layout = deliver, call.layout
        #: residual to the sequences that it is taken of, until it has been
        self._open = dict(some)
        self._have: dict[str, torch.Tensor] = {}
        needed = _names(tuple(some))
        for name, x, heads in (
            ("q", call.query, call.heads),
            ("k", call.key, call.groups),
            ("v", call.value, call.groups),
            ("o", call.output, call.heads),
        ):
            if name in needed:
                self._have[name] = call.arranged(x.data, heads)  # in half the time of ``detach``
            if f"d{name}" in needed and x.requires_grad:
                # not a word of ``call`` in the hook: it holds the graph, which holds the hook
                x.register_hook(guard(partial(self._arrived, f"d{name}", heads)))

    def _arrived(self, name: str, heads: int, gradient: torch.Tensor) -> None:
        if name not in _names(tuple(self._open)):
            return  # a second backward pass
        have = self._have
        have[name] = arranged(bare(gradient), heads, self._layout)
        done = [
            signal
            for signal in self._open
            if name in _ATTENTION[signal][1] and have.keys() >= _names((signal,))
        ]
        for signal in done:
            (terms, names), some = _ATTENTION[signal], self._open.pop(signal)
            self._deliver(signal, terms(*[have[n][:, some] for n in names]))
        if done:
            for gone in have.keys() - _names(tuple(self._open)):
                del have[gone]


class NormBorder:
    """Input and output of one call of a norm, and their gradients as they come.

    Each token is a test by itself, so some of them do.

    Args:
        call: the tensors of the graph, with as many tokens as there are.
        some: which positions of a dimension are looked at, of how many tokens and positions.
        deliver: called with x, dx, y, dy of these tokens, [..., D] each.
        guard: wraps the hooks.
    """

    def __init__(
        self,
        call: NormCall,
        some: Callable[[int, int], slice],
        deliver: Callable[..., None],
        guard: Guard,
    ) -> None:
        if not (call.x.requires_grad and call.y.requires_grad):
            return
        self._deliver = deliver
        tokens = call.x.shape[:-1]
        longest = max(tokens, default=1)
        at = tokens.index(longest) if tokens else 0
        self._taken = (slice(None),) * at + (some(tokens.numel(), longest),) if tokens else ()
        self._x, self._y = call.x.data[self._taken], call.y.data[self._taken]
        self._dx = self._dy = None
        self._parts = watch_parts(call.x, call.y, guard(self._on_part))
        call.y.register_hook(guard(self._on_output))

    def _on_output(self, gradient: torch.Tensor) -> None:
        self._dy = bare(gradient)[self._taken]

    def _on_part(self, gradient: torch.Tensor) -> None:
        """Add a part of the input's gradient; what came is the engine's, which may write to it."""
        part = bare(gradient)[self._taken]
        self._dx = part.clone() if self._dx is None else self._dx.add_(part)
        self._parts -= 1
        if self._parts == 0:  # less than none: a second backward pass
            self._deliver(self._x, self._dx, self._y, self._dy)
            self._x = self._y = self._dx = self._dy = None
