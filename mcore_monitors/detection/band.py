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
from mcore_monitors.detection.cells import LEAST_POOL, Cells
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.detection.transforms import scale_of
from mcore_monitors.sample import Sample

#: Fall of the learning rate between two samples that starts a new reference.
_LEARNING_RATE_FALL = 0.9


class BandRule:
    """The band rule over all cells of a run; feed it samples in the order of iterations."""

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config
        #: (signal, whether they are means over layers) to cells that are judged together
        self._cells: dict[tuple[str, bool], list[Cells]] = {}
        self._learning_rate: float | None = None
        self.judged: set[str] = set()
        """Signals (without windows) that have been judged so far."""

    def update(self, sample: Sample) -> list[Alarm]:
        """Judge one sample and return the alarms that it raised."""
        if sample.iteration < self.config.warmup:
            return []
        self._watch_learning_rate(sample.learning_rate)
        alarms: list[Alarm] = []
        for signal in sorted(sample.signals):
            info = SIGNALS.get(base_name(signal))
            if not is_judged(signal, self.config.windows) or info.watch == "limit":
                continue
            layers = sample.signals[signal]
            raised: list[Alarm] = []
            means: dict[int, list[float]] = {}
            least: dict[int, float] = {}
            for cells in self._together(signal, layers, whole=False):
                values = np.array([layers[layer] for layer in cells.layers], dtype=float)
                raised += cells.update(sample.iteration, values.ravel())
                self._note(cells)
                if cells.units >= LEAST_POOL:
                    means |= _means(cells, values)
                    independent = (cells.pooled / cells.units**0.5).tolist()
                    least |= dict(zip(cells.layers, independent, strict=True))
            for cells in self._together(signal, means, whole=True):
                values = np.array([means[layer][0] for layer in cells.layers])
                floor = np.array([least[layer] for layer in cells.layers])
                raised += cells.update(sample.iteration, values, floor)
                self._note(cells)
            alarms += sorted(raised, key=lambda alarm: alarm.layer)
        return alarms

    def _together(
        self, signal: str, layers: Mapping[int, Sequence[float]], *, whole: bool
    ) -> list[Cells]:
        """The cells of a sample, in as few groups as can be.

        Layers that were always read together are one group. Where only some of them are read, or
        one with another number of units, each goes on by itself; no time passes for the others.
        """
        sizes = {layer: len(layers[layer]) for layer in sorted(layers)}
        groups = self._cells.setdefault((signal, whole), [])
        if len(groups) == 1 and sizes == dict.fromkeys(groups[0].layers, groups[0].units):
            return groups
        kept: list[Cells] = []
        for group in groups:
            here = [layer in sizes for layer in group.layers]
            same = [sizes.get(layer, group.units) == group.units for layer in group.layers]
            whole_group = all(same) and (all(here) or not any(here))
            parts = [group] if whole_group or len(here) == 1 else group.apart()
            # a layer with another number of units begins anew
            kept += [p for p in parts if sizes.get(p.layers[0], p.units) == p.units]
        known = {layer for group in kept for layer in group.layers}
        for units in sorted({size for layer, size in sizes.items() if layer not in known}):
            new = [layer for layer, n in sizes.items() if n == units and layer not in known]
            kept.append(Cells(signal, new, units, self.config, whole=whole))
        self._cells[signal, whole] = kept
        return [group for group in kept if group.layers[0] in sizes]

    def _note(self, cells: Cells) -> None:
        if cells.judged:
            self.judged.add(cells.info.name)

    def active(self) -> list[Alarm]:
        """Return the alarms whose cell has not been calm for ``2 × sustain`` samples yet."""
        groups = (cells for group in self._cells.values() for cells in group)
        return [alarm for cells in groups for alarm in cells.raised.values()]

    def _watch_learning_rate(self, now: float | None) -> None:
        before = self._learning_rate
        if now is None or not math.isfinite(now):
            return
        self._learning_rate = now
        if before is not None and now < _LEARNING_RATE_FALL * before:
            for group in self._cells.values():
                for cells in group:
                    cells.forget_all()


def _means(cells: Cells, values: np.ndarray) -> dict[int, list[float]]:
    """Mean over each layer's units on the transformed scale, where all have a reading.

    Args:
        values: [layers, units].
    """
    scale = scale_of(cells.info.name)
    return {
        layer: [scale.inverse(float(scale.forward(row).mean()))]
        for layer, row in zip(cells.layers, values, strict=True)
        if np.isfinite(row).all()
    }
