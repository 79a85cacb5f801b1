"""The band rule's memory: references, streaks and alarms of cells, many of them at once.

What the numbers are for is told in :mod:`.band`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from mcore_monitors.catalogue import SIGNALS, SignalInfo, base_name
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


def _median(rows: np.ndarray) -> np.ndarray:
    """Return [n]: the median of each row of [n, samples], NaN left out; NaN for an empty row.

    ``np.nanmedian`` does the same fifty times slower on arrays as small as these.
    """
    count = np.isfinite(rows).sum(axis=1)
    ordered = np.sort(rows, axis=1)
    row = np.arange(len(rows))
    last = rows.shape[1] - 1
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, last)
    return (ordered[row, low] + ordered[row, high]) / 2


class Cells:
    """Cells of one signal in layers that have equally many units.

    Arrays have shape [cells]: the units of the first layer, those of the second, and so on.

    Args:
        layers: layer numbers.
        units: cells of each layer.
        whole: whether the cells are means over layers.
    """

    def __init__(
        self,
        signal: str,
        layers: Sequence[int],
        units: int,
        config: DetectionConfig,
        *,
        whole: bool = False,
    ) -> None:
        self.signal, self.layers, self.units = signal, tuple(layers), units
        self.config, self.whole = config, whole
        self.info: SignalInfo = SIGNALS[base_name(signal)]
        self.scale = scale_of(self.info.name)
        n = len(self.layers) * units
        self.reference = np.full((n, config.reference), np.nan)
        self.medians = np.full((n, _MEMORY * config.reference), np.nan)
        self.spreads = np.full_like(self.medians, np.nan)
        self.waiting: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self.side = np.zeros(n)
        self.streak = np.zeros(n, dtype=int)
        self.onset = np.zeros(n, dtype=int)
        self.away = np.zeros(n, dtype=int)
        self.calm = np.zeros(n, dtype=int)
        self.raised: dict[int, Alarm] = {}
        self.judged = False
        #: spread that the units of each layer share; 0 where too few are judged
        self.pooled = np.zeros(len(self.layers))

    def apart(self) -> list[Cells]:
        """The same cells, those of each layer by themselves."""
        parts = []
        for place, layer in enumerate(self.layers):
            part = Cells(self.signal, [layer], self.units, self.config, whole=self.whole)
            rows = slice(place * self.units, (place + 1) * self.units)
            for name in (
                "reference", "medians", "spreads", "side", "streak", "onset", "away", "calm",
            ):  # fmt: skip
                setattr(part, name, getattr(self, name)[rows].copy())
            part.waiting.extend((level[rows], admitted[rows]) for level, admitted in self.waiting)
            part.raised = {
                cell - rows.start: alarm
                for cell, alarm in self.raised.items()
                if rows.start <= cell < rows.stop
            }
            part.judged, part.pooled = self.judged, self.pooled[place : place + 1].copy()
            parts.append(part)
        return parts

    def forget(self, cells: np.ndarray) -> None:
        """Start the reference of ``cells`` ([cells] bool) anew and end their streaks."""
        self.reference[cells] = np.nan
        self.medians[cells] = np.nan
        self.spreads[cells] = np.nan
        for _, admitted in self.waiting:
            admitted[cells] = False
        for counter in (self.streak, self.away, self.calm):
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
            least: [layers] the spread is never below this.
        """
        judged = np.isfinite(self.reference).sum(axis=1) >= LEAST_REFERENCE
        median = _median(self.reference)
        spread = _MAD_TO_SIGMA * _median(np.abs(self.reference - median[:, None]))
        floor = np.maximum(least, self.scale.floor)
        if self.units >= LEAST_POOL:
            usable = judged.reshape(-1, self.units)
            of_judged = np.where(usable, spread.reshape(-1, self.units), np.nan)
            pool = usable.sum(axis=1) >= LEAST_POOL
            self.pooled = np.where(pool, _median(of_judged), 0.0)
            floor = np.maximum(floor, self.pooled)
        floor = np.broadcast_to(floor, len(self.layers)).repeat(self.units)
        spread = np.maximum(spread, floor)
        if self.info.watch == "both":
            return median, median, spread, judged
        for memory, now in ((self.medians, median), (self.spreads, spread)):
            memory[:, :-1] = memory[:, 1:]
            memory[:, -1] = np.where(judged, now, np.nan)
        best = np.fmax if self.info.watch == "low" else np.fmin
        spread = np.fmax(spread, _median(self.spreads))
        return best.reduce(self.medians, axis=1), median, spread, judged

    def update(
        self, iteration: int, values: np.ndarray, least: np.ndarray | float = 0.0
    ) -> list[Alarm]:
        """Judge one sample, then learn from it.

        Args:
            values: [cells], NaN for no reading.
            least: [layers] the spread is never below this.

        Returns:
            The alarms that the sample raised.
        """
        config = self.config
        finite = np.isfinite(values)
        level = self.scale.forward(np.where(finite, values, 1.0))
        centre, median, spread, judged = self.band(least)
        judged &= finite
        self.judged |= bool(judged.any())
        z = np.where(judged, (level - centre) / spread, 0.0)
        from_median = z if median is centre else np.where(judged, (level - median) / spread, 0.0)
        side = np.sign(z)
        outside = self._strays(z)
        large = np.abs(level - np.where(judged, centre, level)) > self.scale.least
        beyond = outside & large & (np.abs(z) > config.threshold)

        returned = judged & (~outside | (side != self.side))
        self.away[returned] = 0
        self.streak[returned | (judged & ~beyond)] = 0
        self.onset[outside & (self.away == 0)] = iteration
        self.away[outside] += 1
        self.streak[beyond] += 1
        self.side[judged] = side[judged]
        alarms = self._raise(iteration, values, centre, spread, z)
        self._calm_down(judged & ~outside, outside)

        self.waiting.append((level, finite & ~self._strays(from_median)))
        if len(self.waiting) > config.lag:
            self._admit(*self.waiting.popleft())
        settled = self.away >= _READAPT * config.reference
        if settled.any():
            self.forget(settled)
        return alarms

    def _strays(self, z: np.ndarray) -> np.ndarray:
        """Whether scores [cells] lie more than half the threshold off, on the watched side."""
        watch = self.info.watch
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
            severity = self._severity(float(z[cell]))
            before = self.raised.get(cell)
            if before is not None and (before.severity == CRITICAL or severity == WARNING):
                continue
            self.raised[cell] = alarm = self._alarm(
                iteration, cell, severity, values[cell], centre[cell], spread[cell], z[cell]
            )
            alarms.append(alarm)
        return alarms

    def _severity(self, z: float) -> str:
        if not self.info.name.startswith("router/"):
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
        reach = max(self.config.threshold * spread, self.scale.least)
        watch, inverse = self.info.watch, self.scale.inverse
        low = inverse(centre - reach) if watch in ("low", "both") else None
        high = inverse(centre + reach) if watch in ("high", "both") else None
        edge = f"below {low:.3g}" if z < 0 else f"above {high:.3g}"
        return Alarm(
            signal=self.signal,
            layer=self.layers[cell // self.units],
            unit=None if self.whole or self.info.unit == "layer" else cell % self.units,
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
        self.reference[admitted, :-1] = self.reference[admitted, 1:]
        self.reference[admitted, -1] = level[admitted]
