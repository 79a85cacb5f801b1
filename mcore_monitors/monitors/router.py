"""Router signals: is the mixture of experts still choosing?

From the weights, one rank a layer: similarity, conditioning and lengths of the expert rows. From
the logits of all tokens of training since the last sample, on every rank that routes tokens:
entropy, prediction, router z, margin, load and agreement with the choice without the expert bias.
Formulas in :mod:`mcore_monitors.signals.router`, what each says in
:mod:`mcore_monitors.catalogue.router`.
"""

from __future__ import annotations

import math

import torch

from ..signals import router as signals
from ..views import ModelView
from .base import Monitor, Readings, mean_by_layer
from .router_sums import EDGES, SUMS, RouterSums

#: quantiles over tokens: suffix of the signal's name to q
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}

_OF_WEIGHT = {
    "weight_similarity": signals.weight_similarity,
    "centred_conditioning": signals.centred_conditioning,
    "row_norm_spread": signals.row_norm_spread,
}
_OF_TOKENS = {
    "entropy": "routing_entropy",
    "predicted_entropy": "predicted_entropy",
    "squared_logsumexp": "z",
    "mixing_entropy": "mixing_entropy",
    "margin": "topk_margin",
    "agreement": "bias_agreement",
}
_OF_LOAD = {
    "load_max_violation": signals.max_violation,
    "effective_experts": signals.effective_experts,
    "dead_experts": signals.dead_experts,
    "underused_experts": signals.underused_experts,
    "largest_share": signals.largest_share,
}


class RouterMonitor(Monitor):
    """Watches each router's weight and the logits it gives.

    Args:
        every_step: whether the tokens of all steps count, or those of sampled steps only; who
            wires :meth:`on_logits` gives this to ``Runtime.guarded``.
        collective: whether reading a weight gathers it on some rank; the same on all.
    """

    name = "router"

    def __init__(
        self, model: ModelView, *, every_step: bool = True, collective: bool = False
    ) -> None:
        self.every_step, self.collective = every_step, collective
        self._layers, self._experts = model.layers, model.experts
        self._views = model.routers
        self._tokens = RouterSums(model.routers, model.experts, model.device)
        #: layer to the most loaded expert and for how many samples on end it has been that
        self._holder: dict[int, tuple[int, int]] = {}

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
            **{name: (layers, 1) for name in ("weights_count", *_OF_WEIGHT)},
            "sums": (layers, len(SUMS)),
            "upto": (layers, len(EDGES) * signals.BINS),
            "load": (layers, self._experts),
        }

    def restart(self) -> None:
        self._tokens.clear()
        self._holder.clear()

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
        tokens.look()
        for piece, view in enumerate(self._views):
            row = view.layer - 1
            fields["sums"][row] += tokens.sums[piece]
            fields["upto"][row] += tokens.upto[piece].flatten()
            fields["load"][row] += tokens.load[piece]
            if view.read is None:
                continue
            mine = view.replica.owns(piece)
            if mine or view.collective:
                weight = view.read()
            if mine:
                for name, signal in _OF_WEIGHT.items():
                    fields[name][row] += signal(weight)
                fields["weights_count"][row] += 1
        tokens.clear()

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        readings = {
            name: mean_by_layer(fields[name], fields["weights_count"]) for name in _OF_WEIGHT
        }
        sums = dict(zip(SUMS, fields["sums"].split(1, dim=1), strict=True))
        upto = dict(zip(EDGES, fields["upto"].split(signals.BINS, dim=1), strict=True))
        for term, name in _OF_TOKENS.items():
            readings[name] = mean_by_layer(sums[term], sums[f"{term}_tokens"])
        readings["prediction_gap"] = {
            layer: [measured[0] - readings["predicted_entropy"][layer][0]]
            for layer, measured in readings["routing_entropy"].items()
        }
        experts = {
            layer: round(e[0])
            for layer, e in mean_by_layer(sums["experts"], sums["tokens"]).items()
        }
        # of one expert there is no choice: 0 of 0 nats
        nats = {layer: math.log(e) if e > 1 else math.nan for layer, e in experts.items()}
        readings["routing_entropy_normalised"] = {
            layer: [v / nats[layer] for v in values]
            for layer, values in readings["routing_entropy"].items()
        }
        for suffix, q in QUANTILES.items():
            share = _quantiles("entropy", upto, sums["tokens"], q)
            readings[f"routing_entropy_normalised_{suffix}"] = {
                layer: [v if nats[layer] > 0 else math.nan for v in values]
                for layer, values in share.items()
            }
            readings[f"routing_entropy_{suffix}"] = {
                layer: [v * nats[layer] for v in values] for layer, values in share.items()
            }
        readings["topk_margin_q05"] = _quantiles(
            "margin", upto, sums["margin_tokens"], 0.05
        )
        readings |= self._read_load(fields["load"], experts)
        return {f"router/{name}": layers for name, layers in readings.items() if layers}

    def _read_load(self, load: torch.Tensor, experts: dict[int, int]) -> Readings:
        readings: Readings = {name: {} for name in (*_OF_LOAD, "largest_share_held")}
        for layer, count in experts.items():
            counts = load[layer - 1, :count]
            if not counts.sum() > 0:
                continue
            for name, signal in _OF_LOAD.items():
                readings[name][layer] = [signal(counts).item()]
            readings["largest_share_held"][layer] = [float(self._held(layer, counts))]
        return readings

    def _held(self, layer: int, load: torch.Tensor) -> int:
        """For how many samples on end the most loaded expert has been the most loaded one."""
        expert, samples = self._holder.get(layer, (-1, 0))
        if expert < 0 or load[expert] < load.max():
            expert, samples = int(load.argmax()), 0
        self._holder[layer] = expert, samples + 1
        return samples + 1


def _quantiles(
    name: str, upto: dict[str, torch.Tensor], count: torch.Tensor, q: float
) -> dict[int, list[float]]:
    """One quantile a layer; layers without a token are left out."""
    edges = torch.tensor(EDGES[name], dtype=torch.float64)
    values = signals.quantile(upto[name], count.squeeze(1), edges, q)
    return {i + 1: [float(v)] for i, v in enumerate(values) if count[i, 0] > 0}
