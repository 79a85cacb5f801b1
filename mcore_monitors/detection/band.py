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
from collections import deque
from collections.abc import Iterator

import numpy as np

from mcore_monitors.catalogue import SIGNALS, SignalInfo, base_name, is_judged
from mcore_monitors.detection.alarm import CRITICAL, WARNING, Alarm
from mcore_monitors.detection.config import LEAST_REFERENCE, DetectionConfig
from mcore_monitors.detection.transforms import scale_of
from mcore_monitors.sample import Sample

#: Normal consistency: the standard deviation of a Gaussian is this many times its MAD.
_MAD_TO_SIGMA = 1.4826
#: Units from which a layer's spread is pooled over them.
_LEAST_POOL = 4
#: References over which the level of a one-sided band remembers its best median.
_MEMORY = 3
#: A cell away for this many references in a row has a new normal.
_READAPT = 5
#: Fall of the learning rate between two samples that starts a new reference.
_LEARNING_RATE_FALL = 0.9
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


class _Layer:
    """State of one signal in one layer; arrays have shape [n], n the layer's units."""

    def __init__(
        self, signal: str, layer: int, n: int, config: DetectionConfig, *, whole: bool = False
    ) -> None:
        self.signal, self.layer, self.config, self.whole = signal, layer, config, whole
        self.info: SignalInfo = SIGNALS[base_name(signal)]
        self.scale = scale_of(self.info.name)
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
        #: spread that the units of this layer share; 0 where too few are judged
        self.pooled = 0.0
        #: the spread is never below this
        self.least = self.scale.floor

    def forget(self, units: np.ndarray) -> None:
        """Start the reference of ``units`` ([n] bool) anew and end their streaks."""
        self.reference[units] = np.nan
        self.medians[units] = np.nan
        self.spreads[units] = np.nan
        for _, admitted in self.waiting:
            admitted[units] = False
        for counter in (self.streak, self.away, self.calm):
            counter[units] = 0
        for unit in np.flatnonzero(units):
            self.raised.pop(int(unit), None)

    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (level [n], median [n], spread [n], judged [n] bool) of the reference."""
        judged = np.isfinite(self.reference).sum(axis=1) >= LEAST_REFERENCE
        median = _median(self.reference)
        spread = _MAD_TO_SIGMA * _median(np.abs(self.reference - median[:, None]))
        self.pooled = float(np.median(spread[judged])) if judged.sum() >= _LEAST_POOL else 0.0
        spread = np.maximum(spread, max(self.pooled, self.least))
        if self.info.watch == "both":
            return median, median, spread, judged
        for memory, now in ((self.medians, median), (self.spreads, spread)):
            memory[:, :-1] = memory[:, 1:]
            memory[:, -1] = np.where(judged, now, np.nan)
        best = np.fmax if self.info.watch == "low" else np.fmin
        spread = np.fmax(spread, _median(self.spreads))
        return best.reduce(self.medians, axis=1), median, spread, judged

    def update(self, iteration: int, values: np.ndarray) -> Iterator[Alarm]:
        """Judge one sample of this layer (``values`` [n], NaN = no reading), then learn from it."""
        config = self.config
        finite = np.isfinite(values)
        level = self.scale.forward(np.where(finite, values, 1.0))
        centre, median, spread, judged = self.band()
        judged &= finite
        self.judged |= bool(judged.any())
        z, from_median = (
            np.where(judged, (level - middle) / spread, 0.0) for middle in (centre, median)
        )
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
        yield from self._raise(iteration, values, centre, spread, z)
        self._calm_down(judged & ~outside, outside)

        self.waiting.append((level, finite & ~self._strays(from_median)))
        if len(self.waiting) > config.lag:
            self._admit(*self.waiting.popleft())
        self.forget(self.away >= _READAPT * config.reference)

    def _strays(self, z: np.ndarray) -> np.ndarray:
        """Whether scores [n] lie more than half the threshold off, on the watched side."""
        far = {"low": -z, "high": z}.get(self.info.watch, np.abs(z))
        return far > self.config.threshold / 2

    def _raise(
        self,
        iteration: int,
        values: np.ndarray,
        centre: np.ndarray,
        spread: np.ndarray,
        z: np.ndarray,
    ) -> Iterator[Alarm]:
        for unit in map(int, np.flatnonzero(self.streak >= self.config.sustain)):
            severity = self._severity(float(z[unit]))
            before = self.raised.get(unit)
            if before is not None and (before.severity == CRITICAL or severity == WARNING):
                continue
            self.raised[unit] = alarm = self._alarm(
                iteration, unit, severity, values[unit], centre[unit], spread[unit], z[unit]
            )
            yield alarm

    def _severity(self, z: float) -> str:
        if not self.info.name.startswith("router/"):
            return CRITICAL
        return CRITICAL if abs(z) > _ROUTER_CRITICAL * self.config.threshold else WARNING

    def _alarm(
        self,
        iteration: int,
        unit: int,
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
            layer=self.layer,
            unit=None if self.whole or self.info.unit == "layer" else unit,
            iteration=iteration,
            onset_iteration=int(self.onset[unit]),
            severity=severity,
            rule="band",
            value=float(value),
            band={"median": inverse(centre), "low": low, "high": high, "z": float(z)},
            evidence=f"{'the mean over the layer, ' if self.whole else ''}{value:.3g}, is {edge}, the edge of the run's own recent band around "
            f"{inverse(centre):.3g} (z {z:+.1f}, {int(self.streak[unit])} samples in a row)",
        )

    def _calm_down(self, calm: np.ndarray, outside: np.ndarray) -> None:
        self.calm[calm] += 1
        self.calm[outside] = 0
        for unit in list(self.raised):
            if self.calm[unit] >= 2 * self.config.sustain:
                del self.raised[unit]

    def _admit(self, level: np.ndarray, admitted: np.ndarray) -> None:
        self.reference[admitted, :-1] = self.reference[admitted, 1:]
        self.reference[admitted, -1] = level[admitted]


class BandRule:
    """The band rule over all cells of a run; feed it samples in the order of iterations."""

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config
        self._layers: dict[tuple[str, int, bool], _Layer] = {}
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
            for layer in sorted(sample.signals[signal]):
                values = np.asarray(sample.signals[signal][layer], dtype=float)
                alarms += self._judge(sample.iteration, signal, layer, values)
                if len(values) >= _LEAST_POOL and np.isfinite(values).all():
                    scale = scale_of(info.name)
                    mean = scale.inverse(float(scale.forward(values).mean()))
                    whole = np.array([mean])
                    independent = self._layers[signal, layer, False].pooled / len(values) ** 0.5
                    alarms += self._judge(
                        sample.iteration, signal, layer, whole, whole=True, least=independent
                    )
        return alarms

    def _judge(
        self,
        iteration: int,
        signal: str,
        layer: int,
        values: np.ndarray,
        *,
        whole: bool = False,
        least: float = 0.0,
    ) -> list[Alarm]:
        key = (signal, layer, whole)
        state = self._layers.get(key)
        if state is None or state.reference.shape[0] != len(values):
            state = _Layer(signal, layer, len(values), self.config, whole=whole)
            self._layers[key] = state
        state.least = max(least, state.scale.floor)
        alarms = list(state.update(iteration, values))
        if state.judged:
            self.judged.add(base_name(signal))
        return alarms

    def active(self) -> list[Alarm]:
        """Return the alarms whose cell has not been calm for ``2 × sustain`` samples yet."""
        return [alarm for state in self._layers.values() for alarm in state.raised.values()]

    def _watch_learning_rate(self, now: float | None) -> None:
        before = self._learning_rate
        if now is None or not math.isfinite(now):
            return
        self._learning_rate = now
        if before is not None and now < _LEARNING_RATE_FALL * before:
            for state in self._layers.values():
                state.forget(np.ones(state.reference.shape[0], dtype=bool))
