"""The band rule's memory: references, streaks and alarms of cells, many of them at once.

What the numbers are for is told in :mod:`.band`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import groupby

import numpy as np

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.detection.alarm import CRITICAL, WARNING, Alarm
from mcore_monitors.detection.config import LEAST_REFERENCE, DetectionConfig
from mcore_monitors.detection.transforms import scale_of

#: Normal consistency: the standard deviation of a Gaussian is this many times its MAD.
_MAD_TO_SIGMA = 1.4826
#: Units from which a layer's spread is pooled over them.
LEAST_POOL = 4
#: References over which the level of a one-sided band remembers its best median.
_MEMORY = 3
#: A cell away for this many references in a row has a new normal.
_READAPT = 5
#: A router signal is critical only this many thresholds away.
_ROUTER_CRITICAL = 3.0

#: (signal, layer): cells of one place share their spread
Place = tuple[str, int]


def _median(rows: np.ndarray) -> np.ndarray:
    """Return [n]: the median of each row of [n, samples], NaN left out; NaN for an empty row.

    ``np.nanmedian`` does the same fifty times slower on arrays as small as these.
    """
    ordered = rows.copy()
    ordered.sort(axis=1)  # NaN comes last
    last = rows.shape[1] - 1
    if math.isfinite(ordered[:, last].sum()):
        return (ordered[:, last // 2] + ordered[:, (last + 1) // 2]) / 2
    count = np.isfinite(rows).sum(axis=1)
    row = np.arange(len(rows))
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, last)
    return (ordered[row, low] + ordered[row, high]) / 2


class Cells:
    """Cells of places that have equally many units and are watched on the same side.

    Arrays have shape [cells]: the units of the first place, those of the second, and so on.

    Args:
        places: signals in layers; those of one signal follow one another.
        units: cells of each place.
        whole: whether the cells are means over layers.
    """

    def __init__(
        self,
        places: Sequence[Place],
        units: int,
        config: DetectionConfig,
        *,
        whole: bool = False,
    ) -> None:
        self.places, self.units = tuple(places), units
        self.sizes = dict.fromkeys(self.places, units)
        self.config, self.whole = config, whole
        self._infos = [SIGNALS[base_name(signal)] for signal, _ in self.places]
        self._scales = [scale_of(info.name) for info in self._infos]
        #: what brings values to their scales, and the places whose values it is for
        self._forwards: list[tuple[Callable[[np.ndarray], np.ndarray], slice]] = []
        for forward, alike in groupby(range(len(self.places)), lambda i: self._scales[i].forward):
            rows = list(alike)
            self._forwards.append((forward, slice(rows[0], rows[-1] + 1)))
        self._watch = self._infos[0].watch
        self._floor = np.array([scale.floor for scale in self._scales])
        self._least = np.array([scale.least for scale in self._scales]).repeat(units)
        n = len(self.places) * units
        self.reference = np.full((n, config.reference), np.nan)
        #: how many samples are in it
        self.admitted = np.zeros(n, dtype=int)
        #: of the last references, in any order: the next one goes where ``remembered`` points to
        self.remembered = 0
        self.medians = np.full((n, _MEMORY * config.reference), np.nan)
        self.spreads = np.full_like(self.medians, np.nan)
        self.waiting: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self.side = np.zeros(n)
        self.streak = np.zeros(n, dtype=int)
        self.onset = np.zeros(n, dtype=int)
        self.away = np.zeros(n, dtype=int)
        self.calm = np.zeros(n, dtype=int)
        self.raised: dict[int, Alarm] = {}
        #: signals (without windows) of cells that have been judged
        self.judged: set[str] = set()
        self._names = len({info.name for info in self._infos})
        #: spread that the units of each place share; 0 where too few are judged
        self.pooled = np.zeros(len(self.places))

    def part(self, places: Collection[Place]) -> Cells:
        """A copy of the cells of some places."""
        kept = [i for i, place in enumerate(self.places) if place in places]
        part = Cells([self.places[i] for i in kept], self.units, self.config, whole=self.whole)
        rows = [i * self.units + unit for i in kept for unit in range(self.units)]
        for name in (
            "reference", "admitted", "medians", "spreads", "side", "streak", "onset", "away",
            "calm",
        ):  # fmt: skip
            setattr(part, name, getattr(self, name)[rows])
        part.remembered = self.remembered
        part.waiting.extend((level[rows], admitted[rows]) for level, admitted in self.waiting)
        part.raised = {
            i: self.raised[cell] for i, cell in enumerate(rows) if cell in self.raised
        }
        part.judged, part.pooled = set(self.judged), self.pooled[kept]
        return part

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Values [places, units] on the scales of their signals."""
        parts = [forward(values[places]) for forward, places in self._forwards]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def means(self, values: np.ndarray) -> dict[Place, list[float]]:
        """Mean over each place's units on the transformed scale, where all have a reading.

        Args:
            values: [places, units].
        """
        read = np.isfinite(values).all(axis=1)
        levels = self.levels(np.where(read[:, None], values, 1.0)).mean(axis=1).tolist()
        rows = zip(self.places, self._scales, levels, read.tolist(), strict=True)
        return {place: [scale.inverse(level)] for place, scale, level, whole in rows if whole}

    def forget(self, cells: np.ndarray) -> None:
        """Start the reference of ``cells`` ([cells] bool) anew and end their streaks."""
        self.reference[cells] = np.nan
        self.medians[cells] = np.nan
        self.spreads[cells] = np.nan
        for _, admitted in self.waiting:
            admitted[cells] = False
        for counter in (self.admitted, self.streak, self.away, self.calm):
            counter[cells] = 0
        for cell in np.flatnonzero(cells):
            self.raised.pop(int(cell), None)

    def forget_all(self) -> None:
        """Start every reference anew."""
        self.forget(np.ones(len(self.side), dtype=bool))

    def band(
        self, least: np.ndarray | float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (level, median, spread, judged), each [cells], of the reference.

        Args:
            least: [places] the spread is never below this.
        """
        judged = self.admitted >= LEAST_REFERENCE
        median = _median(self.reference)
        spread = _MAD_TO_SIGMA * _median(np.abs(self.reference - median[:, None]))
        floor = np.maximum(least, self._floor)
        if self.units >= LEAST_POOL:
            usable = judged.reshape(-1, self.units)
            of_judged = np.where(usable, spread.reshape(-1, self.units), np.nan)
            pool = usable.sum(axis=1) >= LEAST_POOL
            self.pooled = np.where(pool, _median(of_judged), 0.0)
            floor = np.maximum(floor, self.pooled)
        spread = np.maximum(spread, floor.repeat(self.units))
        if self._watch == "both":
            return median, median, spread, judged
        at, held = self.remembered, self.medians.shape[1]
        self.medians[:, at % held] = np.where(judged, median, np.nan)
        self.spreads[:, at % held] = np.where(judged, spread, np.nan)
        self.remembered = at + 1
        upto = min(at + 1, held)
        best = np.fmax if self._watch == "low" else np.fmin
        spread = np.fmax(spread, _median(self.spreads[:, :upto]))
        return best.reduce(self.medians[:, :upto], axis=1), median, spread, judged

    def update(
        self, iteration: int, values: np.ndarray, least: np.ndarray | float = 0.0
    ) -> list[Alarm]:
        """Judge one sample, then learn from it.

        Args:
            values: [cells], NaN for no reading.
            least: [places] the spread is never below this.

        Returns:
            The alarms that the sample raised.
        """
        finite = np.isfinite(values)
        read = values if finite.all() else np.where(finite, values, 1.0)
        level = self.levels(read.reshape(-1, self.units)).ravel()
        centre, median, spread, judged = self.band(least)
        judged &= finite
        self._note(judged)
        z = np.where(judged, (level - centre) / spread, 0.0)
        outside = strays = self._strays(z)
        if median is not centre:
            strays = self._strays(np.where(judged, (level - median) / spread, 0.0))
        alarms: list[Alarm] = []
        if outside.any():
            alarms = self._count(iteration, values, level, centre, spread, z, judged, outside)
        else:  # as nearly always; whoever was away and is read has come back
            self.away[judged] = 0
            self.streak[judged] = 0
        if self.raised:
            self._calm_down(judged & ~outside, outside)

        self.waiting.append((level, finite & ~strays))
        if len(self.waiting) > self.config.lag:
            self._admit(*self.waiting.popleft())
        settled = self.away >= _READAPT * self.config.reference
        if settled.any():
            self.forget(settled)
        return alarms

    def _count(
        self,
        iteration: int,
        values: np.ndarray,
        level: np.ndarray,
        centre: np.ndarray,
        spread: np.ndarray,
        z: np.ndarray,
        judged: np.ndarray,
        outside: np.ndarray,
    ) -> list[Alarm]:
        """Count for how long cells have been outside and beyond; return the alarms."""
        side = np.sign(z)
        large = np.abs(level - np.where(judged, centre, level)) > self._least
        beyond = outside & large & (np.abs(z) > self.config.threshold)

        returned = judged & (~outside | (side != self.side))
        self.away[returned] = 0
        self.streak[returned | (judged & ~beyond)] = 0
        self.onset[outside & (self.away == 0)] = iteration
        self.away[outside] += 1
        self.streak[beyond] += 1
        # of a cell inside it says nothing: nothing is counted then that another side would end
        self.side[judged] = side[judged]
        return self._raise(iteration, values, centre, spread, z)

    def _note(self, judged: np.ndarray) -> None:
        """Keep the signals of which a cell is judged."""
        if len(self.judged) == self._names:
            return
        of_places = judged.reshape(-1, self.units).any(axis=1).tolist()
        self.judged.update(
            info.name for info, here in zip(self._infos, of_places, strict=True) if here
        )

    def _strays(self, z: np.ndarray) -> np.ndarray:
        """Whether scores [cells] lie more than half the threshold off, on the watched side."""
        watch = self._watch
        far = -z if watch == "low" else z if watch == "high" else np.abs(z)
        return far > self.config.threshold / 2

    def _raise(
        self,
        iteration: int,
        values: np.ndarray,
        centre: np.ndarray,
        spread: np.ndarray,
        z: np.ndarray,
    ) -> list[Alarm]:
        alarms = []
        for cell in map(int, np.flatnonzero(self.streak >= self.config.sustain)):
            severity = self._severity(cell, float(z[cell]))
            before = self.raised.get(cell)
            if before is not None and (before.severity == CRITICAL or severity == WARNING):
                continue
            self.raised[cell] = alarm = self._alarm(
                iteration, cell, severity, values[cell], centre[cell], spread[cell], z[cell]
            )
            alarms.append(alarm)
        return alarms

    def _severity(self, cell: int, z: float) -> str:
        if not self._infos[cell // self.units].name.startswith("router/"):
            return CRITICAL
        return CRITICAL if abs(z) > _ROUTER_CRITICAL * self.config.threshold else WARNING

    def _alarm(
        self,
        iteration: int,
        cell: int,
        severity: str,
        value: float,
        centre: float,
        spread: float,
        z: float,
    ) -> Alarm:
        place = cell // self.units
        (signal, layer), scale = self.places[place], self._scales[place]
        reach = max(self.config.threshold * spread, scale.least)
        watch, inverse = self._watch, scale.inverse
        low = inverse(centre - reach) if watch in ("low", "both") else None
        high = inverse(centre + reach) if watch in ("high", "both") else None
        edge = f"below {low:.3g}" if z < 0 else f"above {high:.3g}"
        return Alarm(
            signal=signal,
            layer=layer,
            unit=None if self.whole or self._infos[place].unit == "layer" else cell % self.units,
            iteration=iteration,
            onset_iteration=int(self.onset[cell]),
            severity=severity,
            rule="band",
            value=float(value),
            band={"median": inverse(centre), "low": low, "high": high, "z": float(z)},
            evidence=f"{'the mean over the layer, ' if self.whole else ''}{value:.3g}, is {edge}, "
            f"the edge of the run's own recent band around {inverse(centre):.3g} "
            f"(z {z:+.1f}, {int(self.streak[cell])} samples in a row)",
        )

    def _calm_down(self, calm: np.ndarray, outside: np.ndarray) -> None:
        self.calm[calm] += 1
        self.calm[outside] = 0
        for cell in list(self.raised):
            if self.calm[cell] >= 2 * self.config.sustain:
                del self.raised[cell]

    def _admit(self, level: np.ndarray, admitted: np.ndarray) -> None:
        cells = slice(None) if admitted.all() else admitted
        self.reference[cells, :-1] = self.reference[cells, 1:]
        self.reference[cells, -1] = level[cells]
        self.admitted[cells] += 1
