"""Conservation residuals: do the kernels' backward passes obey their own identities?

Six identities of backpropagation, each zero for a right kernel up to rounding whatever the data or
the weights (:mod:`mcore_monitors.signals.conservation`), taken from tensors at the border of
attention, norms, routers and the output layer. Beside the size of the key shift its signed
direction is added up over the last samples, where rounding cancels and a bias does not; beside the
size of query–key its square, against what rounding can leave of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ...calls import AttentionCall, NormCall
from ...catalogue.conservation import ATTENTION_RESIDUALS
from ...parallel import GroupSum
from ...signals.conservation import (
    direction_terms,
    key_shift_along,
    key_shift_from_terms,
    norm_scale_terms,
    norm_shift_terms,
    query_key_sums,
    router_shift_terms,
    value_output_from_terms,
    vocabulary_shift_terms,
)
from ...views import ModelView
from ..base import Monitor, Readings, Rhythm, StepState
from .border import AttentionBorder, Guard, NormBorder, bare
from .evidence import Directions, Spread
from .limits import largest_spread, smallest_bias
from .rows import AlikeRows
from .sums import UnitSums
from .terms import PendingTerms, Terms
from .turns import Turns, norm_place

_RESIDUALS = "residuals"
_BIAS, _SPREAD = "attention/key_shift_bias", "attention/query_key_spread"
_QUERY_KEY = ATTENTION_RESIDUALS[2]
#: one sequence of so many is looked at: more where evidence is added up over sequences
ONE_IN = dict(zip(ATTENTION_RESIDUALS, (1, 4, 2), strict=True))
#: tokens of a call of a norm that are looked at, at least; up to twice as many
TOKENS = 16
#: a total and a count for each unit, and what else there is
_SUMS = dict(
    zip(
        ATTENTION_RESIDUALS,
        (key_shift_from_terms, value_output_from_terms, query_key_sums),
        strict=True,
    )
)


class ConservationMonitor(Monitor):
    """Watches what crosses the border of kernels, on sampled steps only.

    Args:
        model: what the host shows; ``model.conserved`` says what holds where.
        context: adds up over the ranks that hold the rest of each sequence.
        vocabulary: adds up over the ranks that hold the rest of each token's logits.
        whole: look at all sequences and tokens of a sample, not at some of them in turn.
        limits: signal to limit, the same on every rank: what comes near it is looked at closely.
        interval: iterations between samples.
        state: tells the hooks which iteration is in progress, hence whose turn it is.

    Attributes:
        guard: wraps every gradient hook; whoever wires the monitor sets it.
        turns: says who is looked at in the sample in progress.
    """

    name = "conservation"

    def __init__(
        self,
        model: ModelView,
        context: GroupSum,
        vocabulary: GroupSum | None = None,
        *,
        whole: bool = False,
        limits: Mapping[str, float] | None = None,
        interval: int = 1,
        state: StepState | None = None,
    ) -> None:
        self.guard: Guard = lambda hook: hook
        self._conserved = model.conserved
        self._context = PendingTerms(context)
        self._vocabulary = PendingTerms(vocabulary or GroupSum(None))
        self.collective = context.size > 1 or self._vocabulary.group.size > 1
        self._directions = Directions(model.layers, model.groups, smallest_bias(model))
        self._spread = Spread(model.layers, model.groups, largest_spread(model))
        # what is pooled over tokens is added up as it comes; attention's terms wait for the sample
        self._sums = UnitSums(model.conserved, model.layers)
        self._alike = AlikeRows(self._take_rows)
        #: layers, each with its first group, to where their evidence stands
        self._rows: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.turns = Turns(
            Rhythm(interval), state or StepState(), limits or {}, model.data, whole=whole
        )

    def schema(self) -> dict[str, tuple[int, ...]]:
        return {
            _RESIDUALS: self._sums.shape,
            _BIAS: self._directions.shape,
            _SPREAD: self._spread.shape,
        }

    # ---- taps ----

    def on_attention(self, layer: int, call: AttentionCall) -> None:
        """Watch one micro-batch of an attention kernel."""
        if not self.turns.is_due("attention", layer):
            return
        some = {
            signal: self.turns.some("attention", min(one_in, call.sequences))
            for signal, one_in in ONE_IN.items()
            if layer in self._conserved[signal].places
        }
        if some:
            AttentionBorder(call, some, partial(self._take_attention, layer), self.guard)

    def _positions(self, tokens: int, positions: int) -> slice:
        return self.turns.some("norm", min(max(1, tokens // TOKENS), positions))

    def _take_attention(self, layer: int, signal: str, terms: Terms) -> None:
        self._context.add(signal, layer, terms)

    def on_norm(self, layer: int, unit: int, call: NormCall) -> None:
        """Watch one micro-batch of a norm; ``unit`` is its place in the catalogue's ``NORMS``."""
        place = norm_place(layer, unit)
        if not self.turns.is_due("norm", place):
            return
        bias = () if call.bias is None else (call.bias.detach(),)
        kind = ("norm", call.eps, call.centred)

        def deliver(tensors: torch.Tensor) -> None:
            self._alike.add(kind, place, tensors, *bias)

        NormBorder(call, self._positions, deliver, self.guard)

    def on_router(self, layer: int, logits: torch.Tensor, *_: Any, **__: Any) -> None:
        """Watch the router logits [..., E] of one micro-batch."""
        if logits.requires_grad and self.turns.is_due("router", layer):
            logits.register_hook(self.guard(partial(self._on_router_gradient, layer)))

    def _on_router_gradient(self, layer: int, gradient: torch.Tensor) -> None:
        self._alike.add("router", layer - 1, bare(gradient))

    def on_output(self, layer: int, logits: torch.Tensor) -> None:
        """Watch the logits [..., V] over this rank's part of the vocabulary."""
        if logits.requires_grad and self.turns.is_due("output", layer):
            logits.register_hook(self.guard(partial(self._on_output_gradient, layer)))

    def _on_output_gradient(self, layer: int, gradient: torch.Tensor) -> None:
        terms = vocabulary_shift_terms(bare(gradient))
        if self._vocabulary.group.size > 1:
            signed, scale = (part.flatten() for part in terms)
            self._vocabulary.add("output/vocabulary_shift", layer, (signed, scale))
        else:
            terms = tuple(part.unsqueeze(0) for part in terms)
            self._pool("output/vocabulary_shift", (layer - 1,), terms)

    # ---- sums ----

    def _take_rows(
        self, kind: Any, places: tuple[int, ...], tensors: list[torch.Tensor]
    ) -> None:
        """Take in the tensors of several calls of norms or routers, [calls, ..., D]."""
        if kind == "router":
            self._pool("router/shift", places, router_shift_terms(*tensors))
            return
        _, eps, centred = kind
        (x, dx, y, dy), bias = tensors[0].unbind(1), tensors[1:]
        bias = bias[0].view(len(places), *(1,) * (x.dim() - 2), -1) if bias else None
        terms = norm_scale_terms(x, dx, y, dy, eps=eps, centred=centred, bias=bias)
        self._pool("norm/scale", places, terms)
        if centred:
            self._pool("norm/shift", places, norm_shift_terms(dx))

    def _pool(self, signal: str, places: tuple[int, ...], terms: Terms) -> None:
        """Add Σ|signed| and Σ scale over tokens: their ratio is the same however these are cut.

        Args:
            terms: signed and scale, [places, ...].
        """
        sizes = terms[0].abs(), terms[1]
        sums = torch.stack([part.flatten(1).sum(1) for part in sizes])
        self._sums.add(signal, places, sums)

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        self._alike.flush()
        for signal, layers, terms in self._context.complete():
            self._add_attention(signal, layers, terms, fields)
        for signal, layers, terms in self._vocabulary.complete():
            self._pool(signal, tuple(layer - 1 for layer in layers), terms)
        self._sums.move(fields[_RESIDUALS])

    def _add_attention(
        self, signal: str, layers: list[int], terms: Terms, fields: dict[str, torch.Tensor]
    ) -> None:
        """Take in complete terms [layers, B, G, ...] of all micro-batches together."""
        signed, scale, *directions = terms
        residual, groups = self._conserved[signal], scale.shape[-1]
        firsts = [(layer - 1) * residual.units + residual.places[layer][0] for layer in layers]
        places = tuple(first + group for first in firsts for group in range(groups))
        total, count, *squares = (part.flatten() for part in _SUMS[signal](signed, scale))
        self._sums.add(signal, places, torch.stack([total, count]))
        if directions:
            along = self._along(signed, scale, directions[0]).double()
            self._add_rows(fields, _BIAS, places, along.flatten(0, 2))
        if squares:
            self._add_rows(fields, _SPREAD, places, torch.stack([*squares, count], 1).double())

    @staticmethod
    def _along(
        signed: torch.Tensor, scale: torch.Tensor, directions: torch.Tensor
    ) -> torch.Tensor:
        """Sums of the key shift along its directions [layers, B, G, n, d]: [layers, G, n, 4]."""
        number = key_shift_along(signed, directions.movedim(3, 0))
        return direction_terms(number, scale.expand_as(number)).permute(1, 2, 0, 3)

    def _add_rows(
        self,
        fields: dict[str, torch.Tensor],
        name: str,
        places: tuple[int, ...],
        rows: torch.Tensor,
    ) -> None:
        """Add rows of evidence, each place's behind one another, to a field."""
        field = fields[name]
        if (name, places) not in self._rows:
            # of a field [layers, units, sums], or [layers, n, units, sums] with n rows a place
            units, n = field.shape[-2], field.shape[1] if field.dim() == 4 else 1
            at = [(p // units * n + i) * units + p % units for p in places for i in range(n)]
            self._rows[name, places] = torch.tensor(at, device=field.device)
        field.view(-1, field.shape[-1]).index_add_(0, self._rows[name, places], rows)

    def restart(self) -> None:
        for pending in (self._context, self._vocabulary):
            pending.clear()
        self._alike.clear()
        self._sums.clear()
        self._directions.clear()
        self._spread.clear()
        self.turns.restart()

    # ---- readings ----

    def sums_of(self, signal: str, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """Totals and counts of one residual in the packed buffer, [2, layers, units]."""
        return self._sums.of(signal, fields[_RESIDUALS])

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        readings = self._sums.readings(fields[_RESIDUALS])
        evidence = self._directions.add(fields[_BIAS].numpy()).tolist()
        shift = readings["attention/key_shift"]
        readings[_BIAS] = {layer: evidence[layer - 1] for layer in shift}
        evidence = self._spread.add(fields[_SPREAD].numpy()).tolist()
        readings[_SPREAD] = {layer: evidence[layer - 1] for layer in readings[_QUERY_KEY]}
        self.turns.heed(readings)
        # what no layer has, as the routers of a dense model, is no reading
        return {signal: layers for signal, layers in readings.items() if layers}

