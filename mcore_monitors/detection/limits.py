"""The limit rule: a conservation residual that passes its fixed limit.

A conservation residual is zero in exact arithmetic and stays at the round-off floor of the number
format in a healthy run, early or late, at any learning rate. It needs no reference of the run's
own, only a limit above that floor, and it is judged from the first sample on. Two readings in a row
are asked for (what is over its limit is read again at the next sample), because a single one can be
spoilt from outside (a step whose gradients overflow, a restart). A value that is not finite says
nothing and changes nothing: the host itself reports such a step, and with loss scaling it is routine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.detection.alarm import CRITICAL, Alarm
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.sample import Sample

#: Readings in a row over the limit that make an alarm.
SUSTAIN_LIMIT = 2
#: Readings in a row under the limit after which a cell may alarm again.
_CALM = 2 * SUSTAIN_LIMIT


@dataclass
class _Cell:
    """A value that is, or was lately, over its limit."""

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
        #: (signal, layer) → unit → what is remembered of it; most are within their limits
        self._cells: dict[tuple[str, int], dict[int, _Cell]] = {}
        #: signal → layer → the last finite value of each unit, else NaN
        self._last: dict[str, dict[int, list[float]]] = {}
        #: signal → its limit; None for what is not judged here
        self._known: dict[str, float | None] = {}
        self.judged: set[str] = set()
        """Signals (without windows) that have been judged so far."""

    def limit(self, signal: str) -> float | None:
        """Return the limit that holds for a signal, or None."""
        name = base_name(signal)
        return self._config.limit_of(name, self._limits.get(name))

    def update(self, sample: Sample) -> list[Alarm]:
        """Judge one sample and return the alarms that it raised."""
        alarms: list[Alarm] = []
        for signal in sorted(sample.signals):
            limit = self._limit_here(signal)
            if limit is None:
                continue
            self.judged.add(base_name(signal))
            layers = sample.signals[signal]
            for layer in sorted(layers):
                values, cells = layers[layer], self._cells.get((signal, layer))
                self._keep(signal, layer, values)
                over = [unit for unit, value in enumerate(values) if value > limit]
                if over or cells:
                    alarms += self._count_units(sample.iteration, signal, layer, values, over)
        return alarms

    def _limit_here(self, signal: str) -> float | None:
        if signal not in self._known:
            info = SIGNALS.get(base_name(signal))
            watched = info is not None and info.watch == "limit"
            self._known[signal] = self.limit(signal) if watched else None
        return self._known[signal]

    def _count_units(
        self, iteration: int, signal: str, layer: int, values: Sequence[float], over: list[int]
    ) -> Iterator[Alarm]:
        """Take in the units that are or were over their limit; yield the alarms."""
        limit, info = self._known[signal], SIGNALS[base_name(signal)]
        cells = self._cells.setdefault((signal, layer), {})
        for unit in sorted({*cells, *over}):
            if unit >= len(values):
                continue
            cell, value = cells.setdefault(unit, _Cell()), values[unit]
            if self._count(cell, iteration, value, limit):
                cell.raised = Alarm(
                    signal=signal,
                    layer=layer,
                    unit=None if info.unit == "layer" else unit,
                    iteration=iteration,
                    onset_iteration=cell.onset,
                    severity=CRITICAL,
                    rule="limit",
                    value=value,
                    limit=limit,
                    evidence=f"{value:.2e} is {value / limit:.3g} times the limit of "
                    f"{limit:.2e} ({cell.over} samples in a row)",
                )
                yield cell.raised
            if not cell.over and cell.raised is None:
                del cells[unit]

    def _keep(self, signal: str, layer: int, values: list[float]) -> None:
        layers = self._last.setdefault(signal, {})
        if not math.isfinite(sum(values)):
            before = layers.get(layer, [])
            if len(before) != len(values):  # the first sample, or of another model's units
                before = [math.nan] * len(values)
            values = [
                new if math.isfinite(new) else old for new, old in zip(values, before, strict=True)
            ]
        layers[layer] = values

    @property
    def sizes(self) -> dict[str, dict[int, list[float]]]:
        """Residual → layer → one size a unit: its last finite value over its limit, else NaN."""
        return {
            signal: {
                layer: [value / self._known[signal] for value in values]
                for layer, values in layers.items()
            }
            for signal, layers in self._last.items()
        }

    def active(self) -> list[Alarm]:
        """Return the alarms whose cell has not been under its limit for four readings yet."""
        return [
            cell.raised
            for _, cells in sorted(self._cells.items())
            for _, cell in sorted(cells.items())
            if cell.raised is not None
        ]

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
