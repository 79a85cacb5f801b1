"""Settings of detection: when a reading counts as a deviation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mcore_monitors.catalogue import SIGNALS
from mcore_monitors.catalogue.conservation import EVIDENCE
from mcore_monitors.errors import ConfigError, nearest
from mcore_monitors.windows import judged_stride

#: A band is not judged with fewer reference samples than this: the median absolute deviation of
#: fewer is too rough to multiply by six.
LEAST_REFERENCE = 12


def _integer(setting: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"detection.{setting}", value, f"an integer >= {least}")


def _number(setting: str, value: object, above: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= above:
        raise ConfigError(f"detection.{setting}", value, f"a number > {above:g}")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """When a reading counts as a deviation from the healthy course."""

    warmup: int = 200
    """Iterations before which nothing becomes a reference: early training is a course of its own.
    Fixed limits hold from the first sample."""
    reference: int = 20
    """Samples in the reference that the band's median and spread are taken from (at least 12)."""
    lag: int = 2
    """Youngest samples kept out of the reference, so that an onset does not blur its own band."""
    threshold: float = 6.0
    """Robust standard deviations from the reference's median that count as a deviation."""
    sustain: int = 3
    """Samples in a row that must deviate before the band rule alarms."""
    limit: float | dict[str, float] | None = None
    """Limits of the conservation residuals (no unit): residual → limit, by the number format and
    sizes of the run for those that are left out. A number holds for all, except for directions
    (``attention/key_shift_bias``, ``attention/query_key_spread``), which are measured in another way. None: all by format and sizes."""
    windows: list[int] | None = None
    """Windows of the update spectra that are judged; the others are recorded only. None: in a run's
    settings the one nearest to 50 iterations (a shorter one is noisier, a longer one slower), and
    every window where there are no such settings."""

    def __post_init__(self) -> None:
        _integer("warmup", self.warmup, 0)
        _integer("reference", self.reference, LEAST_REFERENCE)
        _integer("lag", self.lag, 0)
        _integer("sustain", self.sustain, 1)
        _number("threshold", self.threshold, 0.0)
        if isinstance(self.limit, dict):
            known = [info.name for info in SIGNALS.values() if info.watch == "limit"]
            for name, limit in self.limit.items():
                if name not in known:
                    allowed = "residuals: " + ", ".join(known)
                    raise ConfigError("detection.limit", name, allowed, nearest(name, known))
                _number("limit", limit, 0.0)
        elif self.limit is not None:
            _number("limit", self.limit, 0.0)
        for window in self.windows or ():
            _integer("windows", window, 1)

    def limit_of(self, signal: str, given: float | None) -> float | None:
        """Return the limit of a residual: as set, else ``given``, that of the run's format."""
        if isinstance(self.limit, dict):
            return self.limit.get(signal, given)
        if self.limit is None or signal in EVIDENCE:
            return given
        return self.limit

    def slowest_delay(self, interval: int, windows: Iterable[int] = ()) -> int:
        """Return how many iterations a fault may run before the slowest rule alarms.

        Args:
            interval: iterations between two samples.
            windows: windows of the update signals that are judged, in iterations.
        """
        # Most residuals are looked at in every third sample until they are over their limit.
        residual = max(self.sustain, 4) * interval
        # A window may be compared less often than the run is sampled.
        samples = max(self.sustain, 2)
        return max([residual, *(samples * judged_stride(w, interval) + w for w in windows)])
