"""Evidence that residuals are biased: their signed directions added up over the last samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...signals.conservation import DirectionWindow, direction_bias, direction_layer_log_p

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


def rows(signal: str) -> slice:
    """Where a residual's directions stand among those of all residuals."""
    first = 0
    for name, count in DIRECTIONS.items():
        if name == signal:
            return slice(first, first + count)
        first += count
    raise KeyError(signal)


class Directions:
    """The last samples' signed sums of all residuals and layers of a run.

    Args:
        layers, units: of the whole model.
        least: for each residual of :data:`DIRECTIONS` the size of the mean below which a bias is no
            fault: healthy kernels have tiny ones.
    """

    def __init__(self, layers: int, units: int, least: Mapping[str, float]) -> None:
        count = sum(DIRECTIONS.values())
        self.shape = (layers, count, units, 4)
        self._least = torch.tensor(
            [least[name] for name, n in DIRECTIONS.items() for _ in range(n)], dtype=torch.float64
        )
        self._window = DirectionWindow(layers * count * units, 1, max(WINDOWS))

    def add(self, sums: torch.Tensor) -> dict[str, list[float]]:
        """Take in one sample; return the evidence of each residual, one number a layer, in nats.

        Args:
            sums: [layers, directions, units, 4] of one sample, complete over ranks.

        Returns:
            −ln of the bound on the probability that a healthy kernel gives as much, the largest
            over directions and windows; 0 where no unit's mean is as large as ``least``.
        """
        sums = sums.flatten(0, 2)
        # a step whose gradients overflowed must not blind the window for all its samples
        self._window.add(torch.where(sums.isfinite().all(-1, keepdim=True), sums, 0.0))
        windows = torch.stack([self._window.sums(last) for last in WINDOWS])
        windows = windows.view(len(WINDOWS), *self.shape)
        # a unit that nobody counted has no direction: 0/0
        log_p = direction_layer_log_p(windows).nan_to_num(0.0)
        biased = direction_bias(windows).nan_to_num(0.0).amax(-1) >= self._least
        evidence = torch.where(biased, -log_p, 0.0).amax(0)  # [layers, directions]
        return {name: evidence[:, rows(name)].amax(1).tolist() for name in DIRECTIONS}

    def clear(self) -> None:
        """Forget all samples."""
        self._window.clear()
