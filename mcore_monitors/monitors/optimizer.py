"""Optimizer signals: how far a step moved each layer, and how unusual its gradients were.

Records what :mod:`mcore_monitors.catalogue.optimizer` lists.
"""

from __future__ import annotations

import torch

from ..signals.optimizer import SUMS, StepSums, step_readings
from ..views import ModelView
from .base import Monitor, Readings, Rhythm

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
        self._rhythm, self._every = Rhythm(interval), every
        self._views = model.optimizer
        self._sums = StepSums(model.device)

    def reads(self, layer: int, iteration: int) -> bool:
        """Whether it is a layer's turn at the sample of an iteration."""
        return (self._rhythm.turn(iteration) + layer) % self._every == 0

    def schema(self) -> dict[str, tuple[int, ...]]:
        return {"sums": (self._layers, len(SUMS))}

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        views = [v for v in self._views if self.reads(v.layer, iteration)]
        for view in views:
            state = view.read()
            if state is not None:
                self._sums.add(
                    view.layer - 1, state.weight, state.gradient, state.m, state.v, state.made
                )
        if views:
            fields["sums"] += self._sums.result(self._layers)

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        sums = fields["sums"]
        elements = sums[:, SUMS.index("elements")].tolist()
        layers = [i for i, n in enumerate(elements) if n > 0]
        if not layers:
            return {}
        columns = [column.tolist() for column in step_readings(sums[layers])]
        return {
            name: {i + 1: [value] for i, value in zip(layers, column, strict=True)}
            for name, column in zip(NAMES, columns, strict=True)
        }
