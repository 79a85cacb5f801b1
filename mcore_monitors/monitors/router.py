"""Router signals: is the mixture of experts still choosing?

Records ``router/weight_similarity``, ``router/centred_conditioning`` (from the weights, one rank a
layer), ``router/routing_entropy`` in nats and ``router/routing_entropy_normalised`` (per token,
over all tokens of the sampled step). Formulas in :mod:`mcore_monitors.signals.router`.
"""

from __future__ import annotations

import math

import torch

from ..signals.router import centred_conditioning, routing_entropy_sums, weight_similarity
from ..views import ModelView
from .base import Monitor, Readings, mean_by_layer


class RouterMonitor(Monitor):
    """Watches each router's weight and the logits it gives on sampled steps."""

    name = "router"

    def __init__(self, model: ModelView) -> None:
        self._layers = model.layers
        self._experts = model.experts
        self._score = model.router_score
        self._views = model.routers
        self._entropy = {
            view.layer: torch.zeros(2, dtype=torch.float64, device=model.device)
            for view in model.routers
        }

    def schema(self) -> dict[str, tuple[int, ...]]:
        layers = (self._layers, 1)
        return {
            "similarity": layers,
            "conditioning": layers,
            "weights_count": layers,
            "entropy_sum": layers,
            "entropy_count": layers,
        }

    def on_logits(
        self, layer: int, logits: torch.Tensor, padding: torch.Tensor | None = None
    ) -> None:
        """Take in the logits of one micro-batch, [..., E]; ``padding`` is True at padded tokens."""
        keep = None if padding is None else ~padding
        total, count = routing_entropy_sums(logits.detach(), score=self._score, mask=keep)
        self._entropy[layer][0] += total
        self._entropy[layer][1] += count

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        for piece, view in enumerate(self._views):
            row = view.layer - 1
            sums = self._entropy[view.layer]
            fields["entropy_sum"][row] += sums[0]
            fields["entropy_count"][row] += sums[1]
            sums.zero_()
            if view.read is not None and view.replica.owns(piece):
                weight = view.read()
                fields["similarity"][row] += weight_similarity(weight)
                fields["conditioning"][row] += centred_conditioning(weight)
                fields["weights_count"][row] += 1

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        entropy = mean_by_layer(fields["entropy_sum"], fields["entropy_count"])
        # of one expert there is no choice: 0 of 0 nats
        nats = math.log(self._experts) if self._experts > 1 else math.nan
        return {
            "router/weight_similarity": mean_by_layer(
                fields["similarity"], fields["weights_count"]
            ),
            "router/centred_conditioning": mean_by_layer(
                fields["conditioning"], fields["weights_count"]
            ),
            "router/routing_entropy": entropy,
            "router/routing_entropy_normalised": {
                layer: [v / nats for v in values] for layer, values in entropy.items()
            },
        }
