"""Router readings from the sums over all ranks: every layer and signal at once.

On the CPU, after the collective. A signal is a column [layers], and beside it stands in which
layers anything was counted: the others are left out, while what was counted and is broken is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..signals import router as signals
from .base import Readings
from .router_sums import ALWAYS, EDGES

OF_WEIGHT = {
    "weight_similarity": signals.weight_similarity,
    "centred_conditioning": signals.centred_conditioning,
    "row_norm_spread": signals.row_norm_spread,
}
#: mean of each of ``SELDOM_TERMS``
_OF_TERMS = ("predicted_entropy", "z", "mixing_entropy", "topk_margin", "bias_agreement")
_OF_LOAD = {
    "load_max_violation": signals.max_violation,
    "effective_experts": signals.effective_experts,
    "dead_experts": signals.dead_experts,
    "underused_experts": signals.underused_experts,
    "largest_share": signals.largest_share,
}
#: quantiles over tokens, of the margin the first only
_QUANTILES = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
_SUFFIXES = ("q05", "q50", "q95")
_EDGES = torch.tensor(list(EDGES.values()), dtype=torch.float64)

#: name of a signal to its values [layers], and to what was counted for each, 0 for nothing
_Columns = dict[str, tuple[Tensor, Tensor]]


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
        *measured, counted = fields["weights"].unbind(1)
        columns = {
            name: (total / counted, counted)
            for name, total in zip(OF_WEIGHT, measured, strict=True)
        }
        sums = fields["sums"]
        tokens, experts, entropy = sums[:, :ALWAYS].unbind(1)
        entropy, experts = entropy / tokens, experts / tokens
        # of one expert there is no choice: 0 of 0 nats
        nats = torch.where(experts > 1, experts.round().log(), torch.nan)
        columns["routing_entropy"] = entropy, tokens
        columns["routing_entropy_normalised"] = entropy / nats, tokens
        if sums[:, ALWAYS:].any():
            columns |= _of_terms(sums[:, ALWAYS:], fields["upto"], entropy, nats)
        if fields["load"].any():
            columns |= self._of_load(fields["load"], experts)
        return _readings(columns)

    def _of_load(self, load: Tensor, experts: Tensor) -> _Columns:
        total = load.sum(1)
        counts = experts.tolist()
        measured = torch.full((len(counts), len(_OF_LOAD)), torch.nan, dtype=torch.float64)
        # layers may differ in their number of experts, and shares are of those that there are
        for count in {round(n) for n in counts if n == n}:
            rows = [i for i, n in enumerate(counts) if n == n and round(n) == count]
            some = load[rows, :count]
            measured[rows] = torch.stack([signal(some) for signal in _OF_LOAD.values()], 1)
        columns = dict(zip(_OF_LOAD, measured.unbind(1), strict=True))
        most = enumerate(load.amax(1).tolist())
        held = [self._held(i + 1, load[i], m) if m > 0 else torch.nan for i, m in most]
        columns["largest_share_held"] = torch.tensor(held, dtype=torch.float64)
        return {name: (values, total) for name, values in columns.items()}

    def _held(self, layer: int, load: Tensor, most: float) -> int:
        """For how many samples on end the most loaded expert has been the most loaded one."""
        expert, samples = self._holder.get(layer, (-1, 0))
        if expert < 0 or load[expert] < most:
            expert, samples = int(load.argmax()), 0
        self._holder[layer] = expert, samples + 1
        return samples + 1


def _of_terms(sums: Tensor, upto: Tensor, entropy: Tensor, nats: Tensor) -> _Columns:
    """Means and quantiles over tokens that not every sample has.

    Args:
        sums: [layers, 2 · len(SELDOM_TERMS)] of terms, and how many tokens have each.
        upto: [layers, len(EDGES), BINS].
        entropy, nats: [layers] mean entropy, and the most that it can be.
    """
    totals, counts = sums.chunk(2, 1)
    pairs = zip((totals / counts).unbind(1), counts.unbind(1), strict=True)
    columns = dict(zip(_OF_TERMS, pairs, strict=True))
    margin, (mean, predicted) = columns["topk_margin"][1], columns["predicted_entropy"]
    columns["prediction_gap"] = entropy - mean, predicted
    of_kind = signals.quantile(upto, torch.stack([predicted, margin], 1), _EDGES, _QUANTILES)
    for i, suffix in enumerate(_SUFFIXES):
        nat = of_kind[:, 0, i] * nats
        columns[f"routing_entropy_{suffix}"] = nat, predicted
        columns[f"routing_entropy_normalised_{suffix}"] = nat / nats, predicted
    columns["topk_margin_q05"] = of_kind[:, 1, 0], margin
    return columns


def _readings(columns: _Columns) -> Readings:
    """All signals that any layer has, with the layers that have it."""
    values = torch.stack([values for values, _ in columns.values()]).tolist()
    # true for NaN: what is broken must not pass as empty
    seen = (torch.stack([count for _, count in columns.values()]) != 0).tolist()
    return {
        f"router/{name}": {i: [v] for i, (v, t) in enumerate(zip(row, there, strict=True), 1) if t}
        for name, row, there in zip(columns, values, seen, strict=True)
        if any(there)
    }
