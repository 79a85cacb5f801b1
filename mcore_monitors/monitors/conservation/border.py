"""What crosses a kernel's border in one micro-batch, until every gradient has come back.

Gradients arrive at different times of the backward pass. Whatever a residual needs is held, as
tensors without a graph, until the last of it is there; then the residual's terms are taken and the
tensors are let go. Nothing else refers to a border but the hooks on its own tensors: where a
gradient never comes it goes with the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


_ATTENTION: dict[str, tuple[Callable[..., Terms], tuple[str, ...]]] = {
    "attention/key_shift": (_key_shift, ("dk", "q", "o", "do")),
    "attention/value_output": (value_output_terms, ("v", "dv", "o", "do")),
    "attention/query_key": (query_key_terms, ("q", "dq", "k", "dk")),
}


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
        self._deliver, self._layout, self._some = deliver, call.layout, some
        self._open = {signal: _ATTENTION[signal] for signal in some}
        tensors = {
            "q": (call.query, call.heads),
            "k": (call.key, call.groups),
            "v": (call.value, call.groups),
            "o": (call.output, call.heads),
        }
        self._have = {n: call.arranged(x.detach(), heads) for n, (x, heads) in tensors.items()}
        needed = {name for _, names in self._open.values() for name in names}
        for name, (x, heads) in tensors.items():
            if f"d{name}" in needed and x.requires_grad:
                # not a word of ``call`` in the hook: it holds the graph, which holds the hook
                x.register_hook(guard(partial(self._arrived, f"d{name}", heads)))

    def _arrived(self, name: str, heads: int, gradient: torch.Tensor) -> None:
        have = self._have
        have[name] = arranged(gradient.detach(), heads, self._layout)
        for signal, (terms, names) in list(self._open.items()):
            if all(map(have.__contains__, names)):
                del self._open[signal]
                some = self._some[signal]
                self._deliver(signal, terms(*[have[n][:, some] for n in names]))
        for gone in have.keys() - set().union(*(names for _, names in self._open.values())):
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
        self._x, self._y = call.x.detach()[self._taken], call.y.detach()[self._taken]
        self._dx = self._dy = None
        self._parts = watch_parts(call.x, call.y, guard(self._on_part))
        call.y.register_hook(guard(self._on_output))

    def _on_output(self, gradient: torch.Tensor) -> None:
        self._dy = gradient.detach()[self._taken]

    def _on_part(self, gradient: torch.Tensor) -> None:
        """Add a part of the input's gradient; what came is the engine's, which may write to it."""
        part = gradient.detach()[self._taken]
        self._dx = part.clone() if self._dx is None else self._dx + part
        self._parts -= 1
        if self._parts == 0:  # less than none: a second backward pass
            self._deliver(self._x, self._dx, self._y, self._dy)
            self._x = self._y = self._dx = self._dy = None
