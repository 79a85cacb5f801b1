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
    key_shift_directions,
    key_shift_terms,
    norm_scale_terms,
    norm_shift_terms,
    query_key_terms,
    value_output_terms,
)
from ...views import AttentionCall, NormCall, arranged
from .terms import Terms

#: wraps a hook so that an error in it turns the monitor off and never reaches the host
Guard = Callable[[Callable[..., None]], Callable[..., None]]
#: takes in (signal, terms)
Deliver = Callable[[str, Terms], None]



def _key_shift(dk: torch.Tensor, q: torch.Tensor, o: torch.Tensor, do: torch.Tensor) -> Terms:
    """The key shift's terms and, [B, G, 2, d], the directions that a wrong row term has."""
    directions = key_shift_directions(q, o, do, dk.shape[2])
    terms = key_shift_terms(dk, query=q, output=o, grad_output=do)
    return (*terms, directions.permute(1, 2, 0, 3))


#: tokens of a call of a norm that are looked at, at least; up to twice as many
TOKENS = 128

_ATTENTION: dict[str, tuple[Callable[..., Terms], tuple[str, ...]]] = {
    "attention/key_shift": (_key_shift, ("dk", "q", "o", "do")),
    "attention/value_output": (value_output_terms, ("v", "dv", "o", "do")),
    "attention/query_key": (query_key_terms, ("q", "dq", "k", "dk")),
}


class AttentionBorder:
    """Q, K, V and O of one call of an attention kernel, and their gradients as they come.

    Args:
        call: the tensors of the graph.
        signals: residuals that hold here.
        deliver: called with the terms of each, [B, G, ...].
        guard: wraps the hooks.
    """

    def __init__(
        self, call: AttentionCall, signals: list[str], deliver: Deliver, guard: Guard
    ) -> None:
        self._deliver, self._layout = deliver, call.layout
        self._open = {signal: _ATTENTION[signal] for signal in signals}
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
        self._have[name] = arranged(gradient.detach(), heads, self._layout)
        for signal, (terms, names) in list(self._open.items()):
            if all(n in self._have for n in names):
                del self._open[signal]
                self._deliver(signal, terms(*(self._have[n] for n in names)))
        needed = {name for _, names in self._open.values() for name in names}
        self._have = {n: x for n, x in self._have.items() if n in needed}


class NormBorder:
    """Input and output of one call of a norm, and their gradients as they come.

    Each token is a test by itself. Of many every so-and-so-many-th is looked at, others at each
    sample.

    Args:
        call: the tensors of the graph.
        turn: number of the sample, which picks the tokens.
        deliver: called with the terms of ``norm/scale`` and, for LayerNorm, ``norm/shift``.
        guard: wraps the hooks.
    """

    def __init__(self, call: NormCall, turn: int, deliver: Deliver, guard: Guard) -> None:
        self._deliver = deliver
        stride = max(1, call.x.shape[:-1].numel() // TOKENS)
        self._rows = slice(turn % stride, None, stride)
        self._x, self._y = self._some(call.x), self._some(call.y)
        self._form = {"eps": call.eps, "centred": call.centred}
        self._bias = None if call.bias is None else call.bias.detach()
        self._beside, self._dy = call.beside, None
        if call.beside is None and call.x.requires_grad:
            call.x.register_hook(guard(self._on_input))
        if call.y.requires_grad:
            call.y.register_hook(guard(self._on_output))

    def _some(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens that are looked at, D], without a graph."""
        return x.detach().reshape(-1, x.shape[-1])[self._rows]

    def _on_output(self, gradient: torch.Tensor) -> None:
        self._dy = self._some(gradient)
        if self._beside is not None and self._x is not None:
            with torch.enable_grad():
                x = self._x.detach().requires_grad_()
                (dx,) = torch.autograd.grad(self._beside(x), x, self._dy)
            self._take(dx)

    def _on_input(self, gradient: torch.Tensor) -> None:
        if self._dy is not None:  # else the output was not used
            self._take(self._some(gradient))

    def _take(self, dx: torch.Tensor) -> None:
        if self._x is None:
            return  # a second backward pass
        terms = norm_scale_terms(self._x, dx, self._y, self._dy, **self._form, bias=self._bias)
        self._deliver("norm/scale", terms)
        if self._form["centred"]:
            self._deliver("norm/shift", norm_shift_terms(dx))
        self._x = self._y = self._dy = None
