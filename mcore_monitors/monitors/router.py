"""Router signals: is the mixture of experts still choosing?

From the weights, one rank a layer: similarity, conditioning and lengths of the expert rows. From
the logits of all tokens of training since the last sample, on every rank that routes tokens: the
entropy; and, at one sample out of ``every``, what no rule judges: quantiles of the entropy, its
prediction, router z, margin, load and agreement with the choice without the expert bias.
Formulas in :mod:`mcore_monitors.signals.router`, what each says in
:mod:`mcore_monitors.catalogue.router`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..signals.router import BINS, weight_signals
from ..views import ModelView
from .base import Monitor, Readings, Rhythm
from .router_read import OF_WEIGHT, RouterReader
from .router_sums import ALWAYS, EDGES, SUMS, RouterSums

#: elements of weights that are measured together
_TOGETHER = 2**22


class RouterMonitor(Monitor):
    """Watches each router's weight and the logits it gives.

    Args:
        every_step: whether the tokens of all steps count, or those of sampled steps only; who
            wires :meth:`on_logits` gives this to ``Crew.guarded``.
        collective: whether reading a weight gathers it on some rank; the same on all.
        interval: iterations between samples.
        every: all is told at one sample out of this many, the first one included; at the others
            the weights' signals and the mean entropy.
    """

    name = "router"

    def __init__(
        self,
        model: ModelView,
        *,
        every_step: bool = True,
        collective: bool = False,
        interval: int = 1,
        every: int = 1,
    ) -> None:
        self.every_step, self.collective = every_step, collective
        self._rhythm = Rhythm(interval, every)
        self._layers, self._experts = model.layers, model.experts
        self._views = model.routers
        self._tokens = RouterSums(model.routers, model.experts, model.device)
        self._rows = self._indices([view.layer - 1 for view in model.routers], model.device)
        #: rows of the weights that are measured together, where they are, and 1 for each
        self._measured: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._reader = RouterReader()

    @staticmethod
    def _indices(rows: Sequence[int], device: torch.device) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(device)

    @property
    def bytes_per_layer(self) -> int:
        """Device memory that is kept for each layer of this rank."""
        return self._tokens.accumulator_bytes // max(1, len(self._views))

    @property
    def waiting_bytes(self) -> int:
        """Device memory of logits that wait to be looked at, for all layers together."""
        return self._tokens.waiting_bytes

    def schema(self) -> dict[str, tuple[int, ...]]:
        layers = self._layers
        return {
            "weights": (layers, len(OF_WEIGHT) + 1),  # and how many were measured
            "sums": (layers, len(SUMS)),
            "upto": (layers, len(EDGES), BINS),
            "load": (layers, self._experts),
        }

    def restart(self) -> None:
        self._tokens.clear()
        self._tokens.whole = True  # until the first sample says where in the run we are
        self._reader.restart()

    def on_logits(
        self,
        layer: int,
        logits: torch.Tensor,
        padding: torch.Tensor | None = None,
        routing_map: torch.Tensor | None = None,
    ) -> None:
        """Take in one micro-batch of training.

        Args:
            layer: global layer number.
            logits: [..., E].
            padding: [...], True at padded tokens.
            routing_map: [..., E] the host's choice, for a rule that chooses by ``host``.
        """
        self._tokens.put(layer, logits, padding, routing_map)

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        tokens = self._tokens
        whole = self._rhythm.is_whole(iteration)
        tokens.look()
        if whole and tokens.whole:
            fields["sums"].index_add_(0, self._rows, tokens.sums)
            fields["upto"].index_add_(0, self._rows, tokens.counts.upto())
            fields["load"].index_add_(0, self._rows, tokens.load)
        else:
            fields["sums"][:, :ALWAYS].index_add_(0, self._rows, tokens.sums[:, :ALWAYS])
        self._collect_weights(fields)
        tokens.clear()
        tokens.whole = self._rhythm.is_whole(iteration + 1)

    def _collect_weights(self, fields: dict[str, torch.Tensor]) -> None:
        """Measure this rank's share of the weights, those of one shape together."""
        alike: dict[torch.Size, dict[int, torch.Tensor]] = {}
        for piece, view in enumerate(self._views):
            mine = view.replica.owns(piece)
            if view.read is None or not (mine or view.collective):
                continue
            weight = view.read()
            if mine:
                group = alike.setdefault(weight.shape, {})
                group[view.layer - 1] = weight
                if len(group) * weight.numel() >= _TOGETHER:
                    self._measure(alike.pop(weight.shape), fields)
        for group in alike.values():
            self._measure(group, fields)

    def _measure(
        self, weights: dict[int, torch.Tensor], fields: dict[str, torch.Tensor]
    ) -> None:
        stack = torch.stack(list(weights.values()))
        rows = tuple(weights)
        if rows not in self._measured:  # the same at every sample
            index = self._indices(rows, stack.device)
            self._measured[rows] = index, torch.ones_like(index, dtype=torch.float64)
        index, ones = self._measured[rows]
        found = torch.stack([*weight_signals(stack), ones], 1)
        fields["weights"].index_add_(0, index, found)

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        return self._reader(fields)
