"""Conservation residuals: do the kernels' backward passes obey their own identities?

Six identities of backpropagation, each zero for a right kernel up to rounding whatever the data or
the weights (:mod:`mcore_monitors.signals.conservation`), taken from tensors at the border of
attention, norms, routers and the output layer. Beside the size of each attention residual its
signed direction is added up over the last samples, where rounding cancels and a bias does not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ...parallel import GroupSum
from ...signals.conservation import (
    DirectionWindow,
    direction_energy,
    direction_terms,
    key_shift_from_terms,
    query_key_from_terms,
    router_shift_terms,
    value_output_from_terms,
    vocabulary_shift_terms,
)
from ...views import ATTENTION_RESIDUALS, AttentionCall, ModelView, NormCall
from ..base import Monitor, Readings, mean_by_layer
from .border import AttentionBorder, Guard, NormBorder
from .terms import PendingTerms, Terms

#: samples over which directions are added up
SAMPLES = 20
_FROM_TERMS = dict(
    zip(
        ATTENTION_RESIDUALS,
        (key_shift_from_terms, value_output_from_terms, query_key_from_terms),
        strict=True,
    )
)


class ConservationMonitor(Monitor):
    """Watches what crosses the border of kernels, on sampled steps only.

    Args:
        model: what the host shows; ``model.conserved`` says what holds where.
        context: adds up over the ranks that hold the rest of each sequence.
        vocabulary: adds up over the ranks that hold the rest of each token's logits.

    Attributes:
        guard: wraps every gradient hook; whoever wires the monitor sets it.
    """

    name = "conservation"

    def __init__(
        self, model: ModelView, context: GroupSum, vocabulary: GroupSum | None = None
    ) -> None:
        self.guard: Guard = lambda hook: hook
        self._conserved, self._layers = model.conserved, model.layers
        self._context = PendingTerms(context)
        self._vocabulary = PendingTerms(vocabulary or GroupSum(None))
        self.collective = context.size > 1 or self._vocabulary.group.size > 1
        # the query and key heads are always there; a host without them says head_dim 0
        self._dimension = dict.fromkeys(ATTENTION_RESIDUALS, 1) | {
            "attention/key_shift": model.head_dim
        }
        self._buffers = {
            field: torch.zeros(shape, dtype=torch.float64, device=model.device)
            for field, shape in self.schema().items()
        }
        self._windows = {
            signal: DirectionWindow(
                model.layers * model.conserved[signal].units, dimension, SAMPLES
            )
            for signal, dimension in self._dimension.items()
            if dimension
        }

    def schema(self) -> dict[str, tuple[int, ...]]:
        fields: dict[str, tuple[int, ...]] = {
            signal: (2, self._layers, residual.units)
            for signal, residual in self._conserved.items()
        }
        for signal, dimension in self._dimension.items():
            if dimension:
                units = self._conserved[signal].units
                fields[f"{signal}_bias"] = (self._layers, units, dimension + 3)
        return fields

    # ---- taps ----

    def on_attention(self, layer: int, call: AttentionCall) -> None:
        """Watch one micro-batch of an attention kernel."""
        holds = [s for s in ATTENTION_RESIDUALS if layer in self._conserved[s].places]
        AttentionBorder(call, holds, partial(self._take_attention, layer), self.guard)

    def _take_attention(self, layer: int, signal: str, terms: Terms) -> None:
        self._context.add(signal, layer, terms)

    def on_norm(self, layer: int, unit: int, call: NormCall) -> None:
        """Watch one micro-batch of a norm; ``unit`` is its place in ``views.NORMS``."""
        NormBorder(call, partial(self._pool, layer, unit), self.guard)

    def on_router(self, layer: int, logits: torch.Tensor, *_: Any, **__: Any) -> None:
        """Watch the router logits [..., E] of one micro-batch."""
        if logits.requires_grad:
            logits.register_hook(self.guard(partial(self._on_router_gradient, layer)))

    def _on_router_gradient(self, layer: int, gradient: torch.Tensor) -> None:
        self._pool(layer, 0, "router/shift", router_shift_terms(gradient.detach()))

    def on_output(self, layer: int, logits: torch.Tensor) -> None:
        """Watch the logits [..., V] over this rank's part of the vocabulary."""
        if logits.requires_grad:
            logits.register_hook(self.guard(partial(self._on_output_gradient, layer)))

    def _on_output_gradient(self, layer: int, gradient: torch.Tensor) -> None:
        terms = vocabulary_shift_terms(gradient.detach())
        if self._vocabulary.group.size > 1:
            signed, scale = (part.flatten() for part in terms)
            self._vocabulary.add("output/vocabulary_shift", layer, (signed, scale))
        else:
            self._pool(layer, 0, "output/vocabulary_shift", terms)

    # ---- sums ----

    def _pool(self, layer: int, unit: int, signal: str, terms: Terms) -> None:
        """Add Σ|signed| and Σ scale over tokens: their ratio is the same however these are cut."""
        total, count = self._buffers[signal][:, layer - 1, unit]
        total += terms[0].abs().sum()
        count += terms[1].sum()

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        for signal, layers, signed, scale in self._context.complete():
            self._add_attention(signal, layers, signed, scale)
        for signal, layers, signed, scale in self._vocabulary.complete():
            for layer, *terms in zip(layers, signed, scale, strict=True):
                self._pool(layer, 0, signal, tuple(terms))
        for name, buffer in self._buffers.items():
            fields[name] += buffer
            buffer.zero_()

    def _add_attention(
        self, signal: str, layers: list[int], signed: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Take in complete terms [layers, B, G, ...] of all micro-batches together."""
        many, groups = len(layers), scale.shape[-1]
        signed = signed.transpose(0, 1).flatten(1, 2)
        scale = scale.transpose(0, 1).flatten(1, 2)
        ratio = torch.stack(_FROM_TERMS[signal](signed, scale)).view(2, many, groups)
        direction = None
        if signal in self._windows:
            direction = direction_terms(signed, scale).view(many, groups, -1)
        for i, layer in enumerate(layers):
            first = self._conserved[signal].places[layer][0]
            here = slice(first, first + groups)
            self._buffers[signal][:, layer - 1, here] += ratio[:, i]
            if direction is not None:
                self._buffers[f"{signal}_bias"][layer - 1, here] += direction[i]

    def restart(self) -> None:
        for pending in (self._context, self._vocabulary):
            pending.clear()
        for buffer in self._buffers.values():
            buffer.zero_()
        for window in self._windows.values():
            window.clear()

    # ---- readings ----

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        readings = {signal: mean_by_layer(*fields[signal]) for signal in self._conserved}
        for signal, window in self._windows.items():
            name = f"{signal}_bias"
            sums = fields[name].flatten(0, 1)
            # a step whose gradients overflowed must not blind the window for all its samples
            finite = sums.isfinite().all(-1, keepdim=True)
            window.add(torch.where(finite, sums, 0.0))
            total = window.sums().view_as(fields[name])
            count = fields[signal][1] > 0
            energy = direction_energy(total)
            readings[name] = {
                layer + 1: energy[layer].tolist()
                for layer in range(self._layers)
                if count[layer].any()
            }
        return readings
