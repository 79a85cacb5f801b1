"""Evidence that a residual is biased: its signed direction added up over the last samples."""

from __future__ import annotations

import torch

from ...signals.conservation import DirectionWindow, direction_bias, direction_layer_log_p
from ...views import ModelView

#: samples that are added up, with the youngest: a short window sees a new fault soon, a long one a
#: small one at all
WINDOWS = (1, 3, 10)
#: directions along which an attention residual is followed: the key shift along the two that a
#: wrong row term pushes it in, the others by their sign
DIRECTIONS = {
    "attention/key_shift": 2,
    "attention/value_output": 1,
    "attention/query_key": 1,
}


class Directions:
    """The last samples' signed sums of one residual, for all layers of a run.

    Args:
        model: for the number of layers and units.
        signal: one of :data:`DIRECTIONS`.
        least: size of the mean (in units of the residual) below which a bias is no fault: healthy
            kernels have tiny ones.
    """

    def __init__(self, model: ModelView, signal: str, least: float) -> None:
        self._shape = (model.layers, model.conserved[signal].units, DIRECTIONS[signal], 4)
        self._least = least
        self._window = DirectionWindow(
            self._shape[0] * self._shape[1] * self._shape[2], 1, max(WINDOWS)
        )

    def add(self, sums: torch.Tensor) -> dict[int, list[float]]:
        """Take in one sample; return the evidence of each layer (from 1), in nats.

        Args:
            sums: [layers, units, directions, 4] of one sample, complete over ranks.

        Returns:
            −ln of the bound on the probability that a healthy kernel gives as much, the largest
            over directions and windows; 0 where no head's mean is as large as ``least``.
        """
        sums = sums.flatten(0, 2)
        # a step whose gradients overflowed must not blind the window for all its samples
        self._window.add(torch.where(sums.isfinite().all(-1, keepdim=True), sums, 0.0))
        evidence = torch.zeros(self._shape[0], dtype=torch.float64)
        for last in WINDOWS:
            window = self._window.sums(last).view(self._shape).transpose(1, 2)
            # a unit that nobody counted has no direction: 0/0
            log_p = direction_layer_log_p(window).nan_to_num(0.0)
            biased = direction_bias(window).nan_to_num(0.0).amax(-1) >= self._least
            evidence = torch.maximum(evidence, torch.where(biased, -log_p, 0.0).amax(-1))
        return {layer + 1: [value] for layer, value in enumerate(evidence.tolist())}

    def clear(self) -> None:
        """Forget all samples."""
        self._window.clear()
