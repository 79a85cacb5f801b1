"""Evidence that the key shift is biased: its signed direction added up over the last samples.

Of the key shift alone: right kernels can leave a one-sided value–output or query–key residual in
16-bit formats, where probabilities that are alike in all rows are rounded alike.
"""

from __future__ import annotations

import torch

from ...catalogue.conservation import BIASES
from ...signals.conservation import DirectionWindow, direction_bias, direction_layer_log_p

#: samples that are added up, with the youngest: a short window sees a new fault soon, a long one a
#: small one at all
WINDOWS = (1, 3, 10)


class Directions:
    """The last samples' signed sums of all layers of a run.

    Args:
        layers, units: of the whole model.
        least: size of the mean below which a bias is no fault: healthy kernels have tiny ones.
    """

    def __init__(self, layers: int, units: int, least: float) -> None:
        self.shape = (layers, len(BIASES), units, 4)
        self._least = least
        self._window = DirectionWindow(layers * len(BIASES) * units, 1, max(WINDOWS))

    def add(self, sums: torch.Tensor) -> torch.Tensor:
        """Take in one sample; return the evidence in nats, [layers, directions].

        Args:
            sums: [layers, directions, units, 4] of one sample, complete over ranks.

        Returns:
            −ln of the bound on the probability that a healthy kernel gives as much, the largest
            over windows; 0 where no unit's mean is as large as ``least``.
        """
        sums = sums.flatten(0, 2)
        # a step whose gradients overflowed must not blind the window for all its samples
        self._window.add(torch.where(sums.isfinite().all(-1, keepdim=True), sums, 0.0))
        windows = torch.stack([self._window.sums(last) for last in WINDOWS])
        windows = windows.view(len(WINDOWS), *self.shape)
        # a unit that nobody counted has no direction: 0/0
        log_p = direction_layer_log_p(windows).nan_to_num(0.0)
        biased = direction_bias(windows).nan_to_num(0.0).amax(-1) >= self._least
        return torch.where(biased, -log_p, 0.0).amax(0)

    def clear(self) -> None:
        """Forget all samples."""
        self._window.clear()
