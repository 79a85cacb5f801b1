"""The band rule: a reading that leaves the run's own recent healthy course, and stays away.

Each cell (signal, layer, unit) is judged against itself: the median and the spread (median absolute
deviation, times 1.4826) of the last ``reference`` admitted samples that are older than ``lag``
samples, on the transformed scale of :mod:`.transforms`. Why it is built this way:

* *One-sided where one side speaks for a fault.* Healthy effective ranks rise about twofold in the
  first thousands of iterations; a two-sided rule alarms in every healthy run.
* *Nothing before the warm-up.* Early training has a course of its own, and as a reference it makes
  every later sample look strange.
* *The reference rolls*, because healthy levels drift for a long time. A drift inside the reference
  widens the spread by itself, so a steady drift of any slope stays below z = 2.
* *Where one side is watched, the level gives way slowly to that side*: it is the highest (watched:
  low) median of the last ``3 × reference`` samples. A fault that takes hundreds of steps to grow
  would otherwise be learnt as it grows; a memory longer than that alarms when a decaying learning
  rate lets healthy ranks sink. Router signals, watched on both sides, follow the plain median.
* *A deviating sample is not admitted*, from half the threshold on and on the watched side, so that
  a slow fault is not taken for the new normal while it grows. This is asked about the reference's
  own median, not about the remembered level: after a healthy decline that level lies above most
  samples, only the highest would be admitted, and the band would narrow around them by itself.
* *The spread is never below that of its neighbours, nor its usual one.* Twenty overlapping windows
  make a rough spread; where a layer has four or more units, theirs is pooled (the median over the
  units). Where the level is remembered, so is the spread: its median over the same memory holds
  where the last reference happens to be calm. That of a layer's mean is at least what independent
  units of the layer would give.
* *The layer's mean is a cell too*, over four or more units on the transformed scale: a fault that
  takes all heads of a layer down a little is out of their common band long before it is out of any
  one head's, whose own wandering is several times as wide.
* *A deviation must also be large*, not only significant (``Scale.least``).
* *Weights and activations of the router only warn* until the deviation is extreme, because they
  move for harmless reasons too: data, a schedule, the balance loss.

The reference starts anew in two cases. A learning rate that falls by more than a tenth between two
samples (a step of the schedule, or a remedy) moves healthy levels; a rise does not reset anything,
because a rise may be the fault. And a cell that has been away for ``5 × reference`` samples without
a break has a new normal: the alarm was given long ago, and a band that old says nothing any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mcore_monitors.catalogue import SIGNALS, base_name, is_judged
from mcore_monitors.detection.alarm import Alarm
from mcore_monitors.detection.cells import LEAST_POOL, Cells, Place
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.sample import Sample

#: Fall of the learning rate between two samples that starts a new reference.
_LEARNING_RATE_FALL = 0.9


class BandRule:
    """The band rule over all cells of a run; feed it samples in the order of iterations."""

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config
        #: (side that is watched, whether they are means over layers) to cells judged together
        self._cells: dict[tuple[str, bool], list[Cells]] = {}
        #: signal to the side on which it is watched here, None where it is not
        self._watched: dict[str, str | None] = {}
        self._learning_rate: float | None = None
        self.judged: set[str] = set()
        """Signals (without windows) that have been judged so far."""

    def update(self, sample: Sample) -> list[Alarm]:
        """Judge one sample and return the alarms that it raised."""
        if sample.iteration < self.config.warmup:
            return []
        self._watch_learning_rate(sample.learning_rate)
        by_side: dict[str, dict[Place, Sequence[float]]] = {}
        for signal in sorted(sample.signals):
            side = self._side(signal)
            if side is not None:
                layers, places = sample.signals[signal], by_side.setdefault(side, {})
                for layer in sorted(layers):
                    places[signal, layer] = layers[layer]
        alarms: list[Alarm] = []
        for side, places in by_side.items():
            means: dict[Place, list[float]] = {}
            least: dict[Place, float] = {}
            for cells in self._together(side, places, whole=False):
                values = np.array([places[place] for place in cells.places], dtype=float)
                alarms += cells.update(sample.iteration, values.ravel())
                self.judged |= cells.judged
                if cells.units >= LEAST_POOL:
                    means |= cells.means(values)
                    independent = (cells.pooled / cells.units**0.5).tolist()
                    least |= dict(zip(cells.places, independent, strict=True))
            for cells in self._together(side, means, whole=True):
                values = np.array([means[place][0] for place in cells.places])
                floor = np.array([least[place] for place in cells.places])
                alarms += cells.update(sample.iteration, values, floor)
                self.judged |= cells.judged
        return sorted(alarms, key=lambda alarm: (alarm.signal, alarm.layer))

    def _side(self, signal: str) -> str | None:
        if signal not in self._watched:
            info = SIGNALS.get(base_name(signal))
            here = is_judged(signal, self.config.windows) and info.watch != "limit"
            self._watched[signal] = info.watch if here else None
        return self._watched[signal]

    def _together(
        self, side: str, places: Mapping[Place, Sequence[float]], *, whole: bool
    ) -> list[Cells]:
        """The cells of a sample, in as few groups as can be.

        Places that were always read together are one group. Where only some of them are read, or
        one with another number of units, these go on by themselves; no time passes for the others.
        """
        sizes = {place: len(values) for place, values in places.items()}
        groups = self._cells.setdefault((side, whole), [])
        if len(groups) == 1 and sizes == groups[0].sizes:
            return groups
        kept: list[Cells] = []
        for group in groups:
            here = {place for place in group.places if sizes.get(place) == group.units}
            away = {place for place in group.places if place not in sizes}
            # a place with another number of units begins anew
            for some in (here, away):
                if len(some) == len(group.places):
                    kept.append(group)
                elif some:
                    kept.append(group.part(some))
        known = {place for group in kept for place in group.places}
        for units in sorted({size for place, size in sizes.items() if place not in known}):
            new = [place for place, n in sizes.items() if n == units and place not in known]
            kept.append(Cells(new, units, self.config, whole=whole))
        self._cells[side, whole] = kept
        return [group for group in kept if group.places[0] in sizes]

    def active(self) -> list[Alarm]:
        """Return the alarms whose cell has not been calm for ``2 × sustain`` samples yet."""
        groups = (cells for group in self._cells.values() for cells in group)
        alarms = (alarm for cells in groups for alarm in cells.raised.values())
        return sorted(alarms, key=lambda alarm: alarm.signal)

    def _watch_learning_rate(self, now: float | None) -> None:
        before = self._learning_rate
        if now is None or not math.isfinite(now):
            return
        self._learning_rate = now
        if before is not None and now < _LEARNING_RATE_FALL * before:
            for group in self._cells.values():
                for cells in group:
                    cells.forget_all()
