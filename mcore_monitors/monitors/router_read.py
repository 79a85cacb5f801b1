"""Router readings from the sums over all ranks: every layer and signal at once.

On the CPU, after the collective. A signal is a column [layers], and beside it stands in which
layers anything was counted: the others are left out, while what was counted and is broken is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..signals import router as signals
from .base import Readings
from .router_sums import EDGES, SUMS

OF_WEIGHT = {
    "weight_similarity": signals.weight_similarity,
    "centred_conditioning": signals.centred_conditioning,
    "row_norm_spread": signals.row_norm_spread,
}
#: quantiles over tokens: suffix of the signal's name to q
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
MARGIN_QUANTILES = {"q05": 0.05}

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
_PLACE = {name: i for i, name in enumerate(SUMS)}
_EDGES = {name: torch.tensor(edges, dtype=torch.float64) for name, edges in EDGES.items()}


class RouterReader:
    """Turns reduced sums into readings, and remembers who had the largest load."""

    def __init__(self) -> None:
        #: layer to the most loaded expert and for how many samples on end it has been that
        self._holder: dict[int, tuple[int, int]] = {}

    def restart(self) -> None:
        """Forget who had the largest load."""
        self._holder.clear()

    def __call__(self, fields: dict[str, Tensor]) -> Readings:
        """Readings of the fields of :class:`mcore_monitors.monitors.router.RouterMonitor`."""
        counted = fields["weights_count"][:, 0]
        columns = _Columns()
        for name, total in zip(OF_WEIGHT, fields["weights"].unbind(1), strict=True):
            columns.add(name, total / counted, counted)
        tokens = fields["sums"][:, _PLACE["tokens"]]
        experts = fields["sums"][:, _PLACE["experts"]] / tokens
        _add_tokens(columns, fields, tokens, experts)
        if fields["load"].any():
            self._add_load(columns, fields["load"], experts)
        return columns.readings()

    def _add_load(self, columns: _Columns, load: Tensor, experts: Tensor) -> None:
        total = load.sum(1)
        held = torch.full_like(total, torch.nan)
        measured = {name: held.clone() for name in _OF_LOAD}
        counts = experts.tolist()
        # layers may differ in their number of experts, and shares are of those that there are
        for count in {round(n) for n in counts if n == n}:
            rows = [i for i, n in enumerate(counts) if n == n and round(n) == count]
            some = load[rows, :count]
            for name, signal in _OF_LOAD.items():
                measured[name][rows] = signal(some)
        for i, most in enumerate(load.max(1).values.tolist()):
            if most > 0:
                held[i] = self._held(i + 1, load[i], most)
        for name, value in (measured | {"largest_share_held": held}).items():
            columns.add(name, value, total)

    def _held(self, layer: int, load: Tensor, most: float) -> int:
        """For how many samples on end the most loaded expert has been the most loaded one."""
        expert, samples = self._holder.get(layer, (-1, 0))
        if expert < 0 or load[expert] < most:
            expert, samples = int(load.argmax()), 0
        self._holder[layer] = expert, samples + 1
        return samples + 1


class _Columns:
    """Signals by name: values of all layers, and where there is one."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def add(self, name: str, values: Tensor, count: Tensor) -> None:
        """Add a signal: [layers] values and how much was counted for each, 0 for nothing."""
        self._values[name], self._counts[name] = values, count

    def readings(self) -> Readings:
        """All signals that any layer has, with the layers that have it."""
        names = list(self._values)
        values = torch.stack([self._values[name] for name in names]).tolist()
        # true for NaN: what is broken must not pass as empty
        seen = (torch.stack([self._counts[name] for name in names]) != 0).tolist()
        readings: Readings = {}
        for name, row, there in zip(names, values, seen, strict=True):
            if any(there):
                readings[f"router/{name}"] = {
                    i: [value] for i, (value, t) in enumerate(zip(row, there, strict=True), 1) if t
                }
        return readings


def _add_tokens(
    columns: _Columns, fields: dict[str, Tensor], tokens: Tensor, experts: Tensor
) -> None:
    """Means and quantiles over tokens."""
    sums = fields["sums"]
    # every row of which is a term, or how many tokens have it
    terms = {name: sums[:, _PLACE[name]] for name in _OF_TOKENS}
    counts = {name: sums[:, _PLACE[f"{name}_tokens"]] for name in _OF_TOKENS}
    for term, name in _OF_TOKENS.items():
        columns.add(name, terms[term] / counts[term], counts[term])
    entropy = columns["routing_entropy"]
    predicted = counts["predicted_entropy"]  # of all tokens, or of none at most samples
    columns.add("prediction_gap", entropy - columns["predicted_entropy"], predicted)
    # of one expert there is no choice: 0 of 0 nats
    nats = torch.where(experts > 1, experts.round().log(), torch.nan)
    columns.add("routing_entropy_normalised", entropy / nats, tokens)
    if not predicted.any():
        return
    found = _quantiles("entropy", fields["upto"], predicted, QUANTILES)
    for suffix, share in found.items():
        columns.add(f"routing_entropy_{suffix}", share * nats, predicted)
        share = torch.where(experts > 1, share, torch.nan)
        columns.add(f"routing_entropy_normalised_{suffix}", share, predicted)
    margin = _quantiles("margin", fields["upto"], counts["margin"], MARGIN_QUANTILES)
    for suffix, value in margin.items():
        columns.add(f"topk_margin_{suffix}", value, counts["margin"])


def _quantiles(
    name: str, upto: Tensor, count: Tensor, quantiles: dict[str, float]
) -> dict[str, Tensor]:
    """Quantiles of every layer [layers], by suffix."""
    of_kind = upto[:, list(EDGES).index(name)]
    q = torch.tensor(list(quantiles.values()), dtype=torch.float64)
    found = signals.quantile(of_kind, count, _EDGES[name], q)
    return dict(zip(quantiles, found.unbind(-1), strict=True))
