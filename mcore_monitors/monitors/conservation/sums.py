"""Totals and counts of all residuals in one buffer: few operations, however many there are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...views import Conserved
from ..base import Readings


class UnitSums:
    """What was added up for every residual, layer and unit of a run since the last sample.

    A *place* is the number of a unit in a row of all units of all layers of one residual.

    Args:
        conserved: the residuals, in the same order on every rank.
        layers: of the whole model.

    Attributes:
        shape: [2, layers, units of all residuals], totals and counts.
    """

    def __init__(
        self, conserved: Mapping[str, Conserved], layers: int, device: torch.device
    ) -> None:
        self._columns: dict[str, slice] = {}
        width = 0
        for signal, residual in conserved.items():
            self._columns[signal] = slice(width, width + residual.units)
            width += residual.units
        self.shape = (2, layers, width)
        self._sums = torch.zeros(2, layers * width, dtype=torch.float64, device=device)
        self._indices: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def add(self, signal: str, places: tuple[int, ...], sums: torch.Tensor) -> None:
        """Add float64 sums [2, places]."""
        key = signal, places
        if key not in self._indices:  # made once for each set of places that comes together
            columns, width = self._columns[signal], self.shape[2]
            units = columns.stop - columns.start
            rows = [place // units * width + columns.start + place % units for place in places]
            self._indices[key] = torch.tensor(rows, device=self._sums.device)
        self._sums.index_add_(1, self._indices[key], sums)

    def move(self, field: torch.Tensor) -> None:
        """Add everything into a field of :attr:`shape`, and begin anew."""
        field += self._sums.view(self.shape)
        self._sums.zero_()

    def clear(self) -> None:
        """Forget what was added."""
        self._sums.zero_()

    def of(self, signal: str, field: torch.Tensor) -> torch.Tensor:
        """One residual's part of a field, [2, layers, units]."""
        return field[:, :, self._columns[signal]]

    def readings(self, field: torch.Tensor) -> Readings:
        """Means of everything that was counted; a unit without a count is NaN."""
        totals, counted = field.numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            means, counts = (totals / counted).tolist(), counted.tolist()
        readings: Readings = {}
        for signal, columns in self._columns.items():
            readings[signal] = {
                layer: mean[columns]
                for layer, (mean, count) in enumerate(zip(means, counts, strict=True), start=1)
                if any(count[columns])  # true for NaN: broken must not pass as empty
            }
        return readings
