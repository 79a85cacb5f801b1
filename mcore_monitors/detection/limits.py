"""The limit rule: a conservation residual that passes its fixed limit.

A conservation residual is zero in exact arithmetic and stays at the round-off floor of the number
format in a healthy run, early or late, at any learning rate. It needs no reference of the run's
own, only a limit above that floor, and it is judged from the first sample on. Two samples in a row
are asked for, because a single reading can be spoilt from outside (a step whose gradients overflow,
a restart). A value that is not finite says nothing and changes nothing: the host itself reports
such a step, and with loss scaling it is routine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.detection.alarm import CRITICAL, Alarm
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.sample import Sample

#: Samples in a row over the limit that make an alarm.
SUSTAIN_LIMIT = 2
#: Samples in a row under the limit after which a cell may alarm again.
_CALM = 2 * SUSTAIN_LIMIT


@dataclass
class _Cell:
    over: int = 0
    under: int = 0
    onset: int = 0
    raised: Alarm | None = None


class LimitRule:
    """The limit rule over all cells of a run; feed it samples in the order of iterations.

    Args:
        config: its ``limit``, where set, wins.
        limits: residual (name without window) → limit for the run's number format. A residual with
            neither is not judged.
    """

    def __init__(self, config: DetectionConfig, limits: Mapping[str, float] | None = None) -> None:
        self._config = config
        self._limits = dict(limits or {})
        self._cells: dict[tuple[str, int, int], _Cell] = {}
        self.sizes: dict[str, dict[int, list[float]]] = {}
        """Residual → layer → one size a unit: its last finite value over its limit, else NaN."""
        self.judged: set[str] = set()
        """Signals (without windows) that have been judged so far."""

    def limit(self, signal: str) -> float | None:
        """Return the limit that holds for a signal, or None."""
        name = base_name(signal)
        return self._config.limit_of(name, self._limits.get(name))

    def update(self, sample: Sample) -> list[Alarm]:
        """Judge one sample and return the alarms that it raised."""
        alarms = []
        for signal in sorted(sample.signals):
            info, limit = SIGNALS.get(base_name(signal)), self.limit(signal)
            if info is None or info.watch != "limit" or limit is None:
                continue
            self.judged.add(info.name)
            for layer in sorted(sample.signals[signal]):
                values = sample.signals[signal][layer]
                self._keep_sizes(signal, layer, [value / limit for value in values])
                for unit, value in enumerate(values):
                    cell = self._cells.setdefault((signal, layer, unit), _Cell())
                    if not self._count(cell, sample.iteration, value, limit):
                        continue
                    cell.raised = Alarm(
                        signal=signal,
                        layer=layer,
                        unit=None if info.unit == "layer" else unit,
                        iteration=sample.iteration,
                        onset_iteration=cell.onset,
                        severity=CRITICAL,
                        rule="limit",
                        value=value,
                        limit=limit,
                        evidence=f"{value:.2e} is {value / limit:.3g} times the limit of "
                        f"{limit:.2e} ({cell.over} samples in a row)",
                    )
                    alarms.append(cell.raised)
        return alarms

    def _keep_sizes(self, signal: str, layer: int, sizes: list[float]) -> None:
        layers = self.sizes.setdefault(signal, {})
        before = layers.get(layer, [])
        if len(before) != len(sizes):  # the first sample, or a history of another model's units
            before = [math.nan] * len(sizes)
        layers[layer] = [
            new if math.isfinite(new) else old for new, old in zip(sizes, before, strict=True)
        ]

    def active(self) -> list[Alarm]:
        """Return the alarms whose cell has not been under its limit for four samples yet."""
        return [cell.raised for cell in self._cells.values() if cell.raised is not None]

    @staticmethod
    def _count(cell: _Cell, iteration: int, value: float, limit: float) -> bool:
        """Take one value in; return whether the cell alarms now."""
        if not math.isfinite(value):
            return False
        if value <= limit:
            cell.over = 0
            cell.under += 1
            if cell.under >= _CALM:
                cell.raised = None
            return False
        if cell.over == 0:
            cell.onset = iteration
        cell.over += 1
        cell.under = 0
        return cell.over >= SUSTAIN_LIMIT and cell.raised is None
