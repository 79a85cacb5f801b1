"""Totals and counts of all residuals in one buffer: few operations, however many there are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...views import Conserved
from ..base import Readings

#: patterns of what comes in a sample that are remembered
_KEPT = 64


class UnitSums:
    """What was added up for every residual, layer and unit of a run since the last sample.

    A *place* is the number of a unit in a row of all units of all layers of one residual.

    Args:
        conserved: the residuals, in the same order on every rank.
        layers: of the whole model.

    Attributes:
        shape: [2, layers, units of all residuals], totals and counts.
    """

    def __init__(self, conserved: Mapping[str, Conserved], layers: int) -> None:
        self._columns: dict[str, slice] = {}
        width = 0
        for signal, residual in conserved.items():
            self._columns[signal] = slice(width, width + residual.units)
            width += residual.units
        self.shape = (2, layers, width)
        self._found: list[tuple[str, tuple[int, ...], torch.Tensor]] = []
        #: where a sample's sums go, by what came of it: mostly the same at every third sample
        self._indices: dict[tuple[tuple[str, tuple[int, ...]], ...], torch.Tensor] = {}

    def add(self, signal: str, places: tuple[int, ...], sums: torch.Tensor) -> None:
        """Add sums [2, places], when the sample is complete."""
        self._found.append((signal, places, sums))

    def move(self, field: torch.Tensor) -> None:
        """Add everything into a field of :attr:`shape`, and begin anew."""
        if not self._found:
            return
        key = tuple((signal, places) for signal, places, _ in self._found)
        if key not in self._indices:
            if len(self._indices) >= _KEPT:  # micro-batches of ever other sizes
                self._indices.clear()
            rows = [row for signal, places in key for row in self._rows(signal, places)]
            self._indices[key] = torch.tensor(rows, device=field.device)
        sums = torch.cat([sums for _, _, sums in self._found], 1).double()
        field.view(2, -1).index_add_(1, self._indices[key], sums)
        self._found.clear()

    def _rows(self, signal: str, places: tuple[int, ...]) -> list[int]:
        columns, width = self._columns[signal], self.shape[2]
        units = columns.stop - columns.start
        return [place // units * width + columns.start + place % units for place in places]

    def clear(self) -> None:
        """Forget what was added."""
        self._found.clear()

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
