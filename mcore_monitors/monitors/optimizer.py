"""Optimizer signals: how far a step moved each layer, and how unusual its gradients were.

Records what :mod:`mcore_monitors.catalogue.optimizer` lists.
"""

from __future__ import annotations

import torch

from ..signals.optimizer import SUMS, step_readings, step_sums
from ..views import ModelView
from .base import Monitor, Readings

NAMES = (
    "optimizer/update_weight_ratio",
    "optimizer/adam_update_rms",
    "optimizer/gradient_spike_share",
)


class OptimizerMonitor(Monitor):
    """Reads Adam's state after the step of a sample, of some layers at each.

    Every element of a layer is read, so the work is that of an optimizer step; layers take turns
    over ``every`` samples, at absolute iterations.

    Args:
        model: what the host shows; ``model.optimizer`` is this rank's share.
        interval: iterations between samples.
        every: a layer is read at one sample out of this many.
    """

    name = "optimizer"

    def __init__(self, model: ModelView, interval: int, every: int) -> None:
        self._layers = model.layers
        self._interval, self._every = interval, every
        self._views = model.optimizer

    def schema(self) -> dict[str, tuple[int, ...]]:
        return {"sums": (self._layers, len(SUMS))}

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        turn = iteration // self._interval
        for view in self._views:
            if (turn + view.layer) % self._every:
                continue
            state = view.read()
            if state is not None:
                fields["sums"][view.layer - 1] += step_sums(
                    state.weight, state.gradient, state.m, state.v, state.made
                )

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        sums = fields["sums"]
        readings: Readings = {name: {} for name in NAMES}
        for layer in range(1, self._layers + 1):
            if sums[layer - 1, SUMS.index("elements")] > 0:
                for name, value in zip(NAMES, step_readings(sums[layer - 1]), strict=True):
                    readings[name][layer] = [value.item()]
        return {name: layers for name, layers in readings.items() if layers}
