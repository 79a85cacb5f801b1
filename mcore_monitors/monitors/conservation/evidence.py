"""Evidence over the last samples: that the key shift is biased, that query–key is no rounding.

Each of one residual only. Right kernels can leave a one-sided value–output in 16-bit formats, where
probabilities that are alike in all rows are rounded alike, and what their rounding of P and O
leaves has no size that is known beforehand; query–key's has.
"""

from __future__ import annotations

import math

import torch

from ...catalogue.conservation import BIASES
from ...signals.conservation import (
    SampleWindow,
    direction_bias,
    direction_layer_log_p,
    spread_log_p,
)

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
        self._window = SampleWindow(layers * len(BIASES) * units, 4, WINDOWS)

    def add(self, sums: torch.Tensor) -> torch.Tensor:
        """Take in one sample; return the evidence in nats, [layers, directions].

        Args:
            sums: [layers, directions, units, 4] of one sample, complete over ranks.

        Returns:
            −ln of the bound on the probability that a healthy kernel gives as much, the largest
            over windows; 0 where no unit's mean is as large as ``least``.
        """
        sums = sums.flatten(0, 2)
        self._window.add(_finite(sums))
        windows = self._window.sums().view(-1, *self.shape)
        # a unit that nobody counted has no direction: 0/0
        log_p = direction_layer_log_p(windows).nan_to_num(0.0)
        biased = direction_bias(windows).nan_to_num(0.0).amax(-1) >= self._least
        return torch.where(biased, -log_p, 0.0).amax(0)

    def clear(self) -> None:
        """Forget all samples."""
        self._window.clear()


class Spread:
    """The last samples' sums of squares of query–key, of all layers of a run.

    Args:
        layers, units: of the whole model.
        sigma: root mean square that a right kernel may leave.
    """

    def __init__(self, layers: int, units: int, sigma: float) -> None:
        self.shape = (layers, units, 2)
        self._sigma = sigma
        self._window = SampleWindow(layers * units, 2, WINDOWS)

    def add(self, sums: torch.Tensor) -> torch.Tensor:
        """Take in one sample; return the evidence in nats, [layers, units].

        Args:
            sums: [layers, units, 2] of one sample, complete over ranks: Σ r² and the number of
                sequences.

        Returns:
            −ln of the bound on the probability that rounding gives as much, the largest over
            windows; NaN where this sample has none.
        """
        here = sums[..., 1] > 0
        sums = sums.flatten(0, 1)
        self._window.add(_finite(sums))
        squares, count = self._window.sums().unbind(-1)
        evidence = -spread_log_p(squares, count, self._sigma).amin(0).view(self.shape[:2])
        return torch.where(here, evidence, torch.nan)

    def clear(self) -> None:
        """Forget all samples."""
        self._window.clear()


def _finite(sums: torch.Tensor) -> torch.Tensor:
    """Sums [rows, sums], rows with a broken one as zeros.

    A step whose gradients overflowed must not blind the window for all its samples.
    """
    if math.isfinite(sums.sum().item()):
        return sums
    return torch.where(sums.isfinite().all(-1, keepdim=True), sums, 0.0)
