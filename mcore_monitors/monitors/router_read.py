"""Router readings from the sums over all ranks: every layer and signal at once.

On the CPU, after the collective. A signal is a column [layers], and beside it stands in which
layers anything was counted: the others are left out, while what was counted and is broken is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..signals import router as signals
from .base import Readings
from .router_sums import ALWAYS, EDGES

#: what :func:`mcore_monitors.signals.router.weight_signals` gives
OF_WEIGHT = ("weight_similarity", "centred_conditioning", "row_norm_spread")
_OF_ENTROPY = ("routing_entropy", "routing_entropy_normalised")
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

#: names of signals, their values [names, layers], and what was counted of them, 0 for nothing
_Columns = tuple[Sequence[str], Iterable[np.ndarray], np.ndarray]


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
        # a few numbers on the host: NumPy takes a third of the time
        weights, sums, load = (fields[name].numpy().T for name in ("weights", "sums", "load"))
        with np.errstate(divide="ignore", invalid="ignore"):
            counted, tokens = weights[-1], sums[0]
            experts, entropy = sums[1:ALWAYS] / tokens
            # of one expert there is no choice: 0 of 0 nats
            nats = np.where(experts > 1, np.log(experts.round()), np.nan)
            columns = [
                (OF_WEIGHT, weights[:-1] / counted, counted),
                (_OF_ENTROPY, (entropy, entropy / nats), tokens),
            ]
            if sums[ALWAYS:].any():
                columns += _of_terms(sums[ALWAYS:], fields["upto"], entropy, nats)
            if load.any():
                columns.append(self._of_load(load.T, experts))
        return _readings(columns)

    def _of_load(self, load: np.ndarray, experts: np.ndarray) -> _Columns:
        counts = experts.tolist()
        measured = np.full((len(_OF_LOAD) + 1, len(counts)), np.nan)
        # layers may differ in their number of experts, and shares are of those that there are
        for count in {round(n) for n in counts if n == n}:
            rows = [i for i, n in enumerate(counts) if n == n and round(n) == count]
            some = load[rows, :count]
            measured[:-1, rows] = [signal(some) for signal in _OF_LOAD.values()]
        for i, most in enumerate(load.max(1).tolist()):
            if most > 0:
                measured[-1, i] = self._held(i + 1, load[i], most)
        return (*_OF_LOAD, "largest_share_held"), measured, load.sum(1)

    def _held(self, layer: int, load: np.ndarray, most: float) -> int:
        """For how many samples on end the most loaded expert has been the most loaded one."""
        expert, samples = self._holder.get(layer, (-1, 0))
        if expert < 0 or load[expert] < most:
            expert, samples = int(load.argmax()), 0
        self._holder[layer] = expert, samples + 1
        return samples + 1


def _of_terms(
    sums: np.ndarray, upto: Tensor, entropy: np.ndarray, nats: np.ndarray
) -> list[_Columns]:
    """Means and quantiles over tokens that not every sample has.

    Args:
        sums: [2 · len(SELDOM_TERMS), layers] of terms, and how many tokens have each.
        upto: [layers, len(EDGES), BINS].
        entropy, nats: [layers] mean entropy, and the most that it can be.
    """
    half = len(_OF_TERMS)
    means, counts = sums[:half] / sums[half:], sums[half:]
    columns = [
        ((name,), mean[None], count)
        for name, mean, count in zip(_OF_TERMS, means, counts, strict=True)
    ]
    predicted, margin = (counts[_OF_TERMS.index(x)] for x in ("predicted_entropy", "topk_margin"))
    columns.append((("prediction_gap",), (entropy - means[0])[None], predicted))
    count = torch.from_numpy(np.stack([predicted, margin], 1))
    of_kind = signals.quantile(upto, count, _EDGES, _QUANTILES).numpy()
    for i, suffix in enumerate(_SUFFIXES):
        nat = of_kind[:, 0, i] * nats
        names = (f"{name}_{suffix}" for name in _OF_ENTROPY)
        columns.append((tuple(names), (nat, nat / nats), predicted))
    columns.append((("topk_margin_q05",), of_kind[None, :, 1, 0], margin))
    return columns


def _readings(columns: Iterable[_Columns]) -> Readings:
    """All signals that any layer has, with the layers that have it."""
    readings: Readings = {}
    for names, rows, counted in columns:
        # true for NaN: what is broken must not pass as empty
        seen = [i for i, there in enumerate((counted != 0).tolist()) if there]
        if not seen:
            continue
        for name, row in zip(names, rows, strict=True):
            values = row.tolist()
            readings[f"router/{name}"] = {i + 1: [values[i]] for i in seen}
    return readings
