"""Evidence over the last samples: that the key shift is biased, that query–key is no rounding.

Each of one residual only. Right kernels can leave a one-sided value–output in 16-bit formats, where
probabilities that are alike in all rows are rounded alike, and what their rounding of P and O
leaves has no size that is known beforehand; query–key's has.
"""

from __future__ import annotations

import math

import numpy as np

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

    @np.errstate(divide="ignore", invalid="ignore")
    def add(self, sums: np.ndarray) -> np.ndarray:
        """Take in one sample; return the evidence in nats, [layers, directions].

        Args:
            sums: [layers, directions, units, 4] of one sample, complete over ranks.

        Returns:
            −ln of the bound on the probability that a healthy kernel gives as much, the largest
            over windows; 0 where no unit's mean is as large as ``least``.
        """
        self._window.add(_finite(sums.reshape(-1, self.shape[-1])))
        windows = self._window.sums().reshape(-1, *self.shape)
        biased = (direction_bias(windows) >= self._least).any(-1)
        if not biased.any():  # as nearly always
            return np.zeros(self.shape[:2])
        log_p = direction_layer_log_p(windows)
        # a unit that nobody counted has no direction: 0/0 is no evidence
        return np.where(biased & (log_p < 0), -log_p, 0.0).max(0)

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

    @np.errstate(divide="ignore", invalid="ignore")
    def add(self, sums: np.ndarray) -> np.ndarray:
        """Take in one sample; return the evidence in nats, [layers, units].

        Args:
            sums: [layers, units, 2] of one sample, complete over ranks: Σ r² and the number of
                sequences.

        Returns:
            −ln of the bound on the probability that rounding gives as much, the largest over
            windows; NaN where this sample has none.
        """
        here = sums[..., 1] > 0
        self._window.add(_finite(sums.reshape(-1, self.shape[-1])))
        squares, count = np.moveaxis(self._window.sums().reshape(-1, *self.shape), -1, 0)
        if not (squares > self._sigma**2 * count).any():  # as nearly always
            return np.where(here, 0.0, np.nan)
        return np.where(here, -spread_log_p(squares, count, self._sigma).min(0), np.nan)

    def clear(self) -> None:
        """Forget all samples."""
        self._window.clear()


def _finite(sums: np.ndarray) -> np.ndarray:
    """Sums [rows, sums], rows with a broken one as zeros.

    A step whose gradients overflowed must not blind the window for all its samples.
    """
    if math.isfinite(sums.sum()):
        return sums
    return np.where(np.isfinite(sums).all(-1, keepdims=True), sums, 0.0)
