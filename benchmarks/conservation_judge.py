"""Alarms of the benchmark of faults, from the readings of one sample after the other.

An alarm is one of three things, at one place and residual:

* size: a unit's residual over its limit (floors.py);
* spread, of query–key only: over the last 1, 3 or 10 samples its squares are larger than rounding
  makes them, p below 1e-5 divided by all tests of a sample;
* direction, of the key shift only: over the last 1, 3 or 10 samples the part along one of the row
  term's directions is one-sided beyond chance, p below 1e-5 divided by all tests of a sample, and
  its mean is at least a quarter of the floor. (The other residuals can be one-sided in a healthy
  bfloat16 kernel: probabilities that are alike in all rows are rounded alike.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from conservation_model import HEADS, Reading

from mcore_monitors.catalogue.conservation import EVIDENCE
from mcore_monitors.monitors.base import Rhythm, StepState
from mcore_monitors.monitors.conservation.evidence import WINDOWS
from mcore_monitors.monitors.conservation.limits import LEAST_BIAS, LEVEL, SPREAD
from mcore_monitors.monitors.conservation.turns import Turns
from mcore_monitors.signals import conservation as c
from mcore_monitors.views import Replica

BIAS_SIGNAL, SPREAD_SIGNAL = EVIDENCE
#: sizes at places of each kind, as they are called here
SIZES = ("attention/", "norm/", "router/", "loss/")
#: takes a signal's name, a reading, and the share of its limit that it has
Note = Callable[[str, Reading, float], None]


class Judge:
    """Alarms from readings: sizes at once, directions over windows.

    Args:
        first: number of the first sample.
        whole: look at all of every sample.
    """

    def __init__(self, first: int, whole: bool) -> None:
        self._windows: dict[tuple[str, int], c.SampleWindow] = {}
        self._spreads: dict[tuple[str, int], c.SampleWindow] = {}
        #: what the last sample showed
        self.found: list[Reading] = []
        self._state = StepState(iteration=first)
        limits = dict.fromkeys((*SIZES, *EVIDENCE), 1.0)
        turns = Turns(Rhythm(1), self._state, limits, Replica(), whole=False)
        self.turns = None if whole else turns

    def sample(self, found: Iterable[Reading]) -> list[dict[str, Any]]:
        """Alarms of one sample."""
        self.found = found = list(found)
        alarms: list[dict[str, Any]] = []
        near: dict[str, dict[int, list[float]]] = {}

        def note(name: str, r: Reading, share: float) -> None:
            """A reading as the monitor's turns take it: a share of its limit."""
            near.setdefault(name, {}).setdefault(r.place[1], []).append(share)

        for windows, terms, shape in (
            (self._windows, "direction", (2 * HEADS, 4)),
            (self._spreads, "spread", (HEADS, 2)),
        ):
            here = {r.place: getattr(r, terms) for r in found if getattr(r, terms) is not None}
            for place in here.keys() | windows.keys():  # also of places that rest at this sample
                window = windows.setdefault(place, c.SampleWindow(*shape, WINDOWS))
                sums = here[place].numpy() if place in here else np.zeros(shape)
                window.add(sums.reshape(shape))
        attentions = max(1, len(self._windows))
        for r in found:
            over = [i for i, v in enumerate(r.value) if not v <= r.limit]
            note(r.place[0] + "/", r, max(r.value) / r.limit)
            if over:
                alarms.append(_alarm(r, "size", over))
            if r.spread is not None:
                log_level = math.log(LEVEL / (len(WINDOWS) * attentions * HEADS))
                alarms += self._spread(r, set(over), log_level, note)
            if r.direction is not None:
                log_level = math.log(LEVEL / (len(WINDOWS) * attentions * 2))
                alarms += self._direction(r, bool(over), log_level, note)
        if self.turns is not None:
            self.turns.heed(near)
        self._state.iteration += 1
        return alarms

    def _spread(
        self, r: Reading, over: set[int], log_level: float, note: Note
    ) -> list[dict[str, Any]]:
        window, sigma = self._spreads[r.place], SPREAD * r.limit
        for last, sums in zip(WINDOWS, window.sums(), strict=True):
            log_p = c.spread_log_p(sums[:, 0], sums[:, 1], sigma)
            note(SPREAD_SIGNAL, r, float(log_p.min()) / log_level)
            units = [i for i, p in enumerate(log_p.tolist()) if p <= log_level and i not in over]
            if units:
                return [_alarm(r, f"spread over {last}", units)]
        return []

    def _direction(
        self, r: Reading, over: bool, log_level: float, note: Note
    ) -> list[dict[str, Any]]:
        alarms = []
        sums = self._windows[r.place].sums().reshape(len(WINDOWS), 2, HEADS, 4)
        for direction in (0, 1):
            for last, of_last in zip(WINDOWS, sums[:, direction], strict=True):
                bias = c.direction_bias(of_last)
                units = [i for i in range(HEADS) if bias[i] >= LEAST_BIAS * r.floor]
                log_p = float(c.direction_layer_log_p(of_last))
                if not units or not log_p < 0:
                    continue
                note(BIAS_SIGNAL, r, log_p / log_level)
                if log_p <= log_level and not over:
                    alarms.append(_alarm(r, f"direction over {last}", units))
                    break
        return alarms


def _alarm(r: Reading, by: str, units: list[int]) -> dict[str, Any]:
    return {"residual": r.residual, "place": list(r.place), "units": units, "by": by}
