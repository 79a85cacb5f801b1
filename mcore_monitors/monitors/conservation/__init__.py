"""Conservation residuals: do the kernels' backward passes obey their own identities?

Six identities of backpropagation, each zero for a right kernel up to rounding whatever the data or
the weights (:mod:`mcore_monitors.signals.conservation`), taken from tensors at the border of
attention, norms, routers and the output layer. Beside the size of the key shift its signed
direction is added up over the last samples, where rounding cancels and a bias does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...parallel import GroupSum
from ...signals.conservation import (
    direction_terms,
    key_shift_along,
    key_shift_from_terms,
    query_key_from_terms,
    router_shift_terms,
    value_output_from_terms,
    vocabulary_shift_terms,
)
from ...views import ATTENTION_RESIDUALS, AttentionCall, ModelView, NormCall
from ..base import Monitor, Readings, mean_by_layer
from .border import AttentionBorder, Guard, NormBorder
from .direction import Directions
from .limits import smallest_bias
from .terms import PendingTerms, Terms

_BIAS = "attention/key_shift_bias"
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
        self._directions = Directions(model.layers, model.groups, smallest_bias(model))
        # what is pooled over tokens is added up as it comes; attention's terms wait for the sample
        self._pooled = {
            signal: torch.zeros(shape, dtype=torch.float64, device=model.device)
            for signal, shape in self.schema().items()
            if signal in model.conserved and signal not in ATTENTION_RESIDUALS
        }
        self._turn = 0

    def schema(self) -> dict[str, tuple[int, ...]]:
        fields: dict[str, tuple[int, ...]] = {
            signal: (2, self._layers, residual.units)
            for signal, residual in self._conserved.items()
        }
        return fields | {_BIAS: self._directions.shape}

    # ---- taps ----

    def on_attention(self, layer: int, call: AttentionCall) -> None:
        """Watch one micro-batch of an attention kernel."""
        holds = [s for s in ATTENTION_RESIDUALS if layer in self._conserved[s].places]
        AttentionBorder(call, holds, partial(self._take_attention, layer), self.guard)

    def _take_attention(self, layer: int, signal: str, terms: Terms) -> None:
        self._context.add(signal, layer, terms)

    def on_norm(self, layer: int, unit: int, call: NormCall) -> None:
        """Watch one micro-batch of a norm; ``unit`` is its place in the catalogue's ``NORMS``."""
        NormBorder(call, self._turn, partial(self._pool, layer, unit), self.guard)

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
        total, count = self._pooled[signal][:, layer - 1, unit]
        total += terms[0].abs().sum()
        count += terms[1].sum()

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        self._turn += 1
        for signal, layers, terms in self._context.complete():
            self._add_attention(signal, layers, terms, fields)
        for signal, layers, terms in self._vocabulary.complete():
            for layer, *of_layer in zip(layers, *terms, strict=True):
                self._pool(layer, 0, signal, tuple(of_layer))
        for signal, sums in self._pooled.items():
            fields[signal] += sums
            sums.zero_()

    def _add_attention(
        self, signal: str, layers: list[int], terms: Terms, fields: dict[str, torch.Tensor]
    ) -> None:
        """Take in complete terms [layers, B, G, ...] of all micro-batches together."""
        # all heads of all layers at once: [B, layers · G, ...]
        signed, scale, *more = (term.transpose(0, 1).flatten(1, 2) for term in terms)
        shape = (len(layers), terms[1].shape[-1])
        ratio = torch.stack(_FROM_TERMS[signal](signed, scale)).view(2, *shape)
        along = self._along(signed, scale, more[0], shape) if more else None
        places = self._conserved[signal].places
        for these, first in _runs([(layer, places[layer][0]) for layer in layers]):
            here = slice(first, first + shape[1])
            at = slice(layers[these.start] - 1, layers[these.stop - 1])
            fields[signal][:, at, here] += ratio[:, these]
            if along is not None:
                fields[_BIAS][at, :, here] += along[these]

    @staticmethod
    def _along(
        signed: torch.Tensor, scale: torch.Tensor, directions: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """Sums of the key shift along its directions, [layers, directions, G, 4]."""
        number = key_shift_along(signed, directions.permute(2, 0, 1, 3)).permute(1, 2, 0)
        scale = scale.unsqueeze(-1).expand_as(number)
        sums = direction_terms(number.flatten(1), scale.flatten(1))
        return sums.view(*shape, -1, 4).transpose(1, 2)

    def restart(self) -> None:
        for pending in (self._context, self._vocabulary):
            pending.clear()
        for sums in self._pooled.values():
            sums.zero_()
        self._directions.clear()

    # ---- readings ----

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        readings = {signal: mean_by_layer(*fields[signal]) for signal in self._conserved}
        evidence = self._directions.add(fields[_BIAS]).tolist()
        shift = readings["attention/key_shift"]
        readings[_BIAS] = {layer: evidence[layer - 1] for layer in shift}
        # what no layer has, as the routers of a dense model, is no reading
        return {signal: layers for signal, layers in readings.items() if layers}


def _runs(places: list[tuple[int, int]]) -> Iterator[tuple[slice, int]]:
    """Stretches of layers that follow one another with their units at the same place.

    Args:
        places: (layer, first unit), ascending.

    Yields:
        (slice of ``places``, first unit).
    """
    start = 0
    for i in range(1, len(places) + 1):
        layer, first = places[i - 1]
        if i == len(places) or places[i] != (layer + 1, first):
            yield slice(start, i), first
            start = i
