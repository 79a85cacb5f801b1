"""The windows of the update signals: how long, how often compared, which snapshots that needs.

A window of ``W`` iterations compares weights with those of ``W`` iterations ago, at every multiple
of its *stride*. The stride grows with the window, so that a window never needs more than
:data:`SNAPSHOTS` earlier weights, however long it is.

What no rule judges is there to be looked at, and computed at every tenth sample only: of a judged
window all but Δ2, and the windows that no rule judges, one after the other, so that no sample has
to compare them all. Windows of 10, 50 (judged) and 200 at interval 10 are compared every 200, 10
and 200 iterations, and few snapshots serve all three instead of 20. Everything counts absolute
iterations, so a resumed run goes on with the same grid.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

#: Snapshots that one window needs at most.
SNAPSHOTS = 5
#: Samples from one record to the next of what no rule judges, by default.
SELDOM = 10
#: Samples between two directions of an update that are held against each other, at least.
_APART = 10
#: Windows of the default settings, in iterations, before they are brought to the run's grid.
USUAL = (10, 50, 200)
#: The window that the band rule judges by default: 10 is noisier, 200 slower.
USUAL_JUDGED = 50


def default_windows(interval: int) -> list[int]:
    """The usual windows as multiples of ``interval`` (each once): at 20 that is 20, 40, 200."""
    return sorted({interval * max(1, round(window / interval)) for window in USUAL})


def default_judged(windows: Sequence[int]) -> list[int]:
    """The one of ``windows`` that is nearest to :data:`USUAL_JUDGED`, the shorter of two."""
    return [min(windows, key=lambda window: (abs(window - USUAL_JUDGED), window))]


def judged_stride(window: int, interval: int) -> int:
    """Iterations between two comparisons of a window that is judged, a multiple of ``interval``."""
    return interval * -(-window // (SNAPSHOTS * interval))


def window_of(signal: str) -> int | None:
    """The window in a signal's name: ``a/b@50`` gives 50, ``a/b`` None."""
    window = signal.partition("@")[2]
    return int(window) if window else None


def _multiple(of: int, least: int) -> int:
    """The smallest multiple of ``of`` that is ``least`` or more."""
    return of * max(1, -(-least // of))


class Grid:
    """When the windows of a run are compared, and which snapshots are held for it.

    Args:
        windows: lengths in iterations, multiples of ``interval``.
        interval: iterations between two samples.
        judged: those that a rule judges; None: all is computed at every sample.
        every: samples from one record to the next of what no rule judges.
    """

    def __init__(
        self,
        windows: Collection[int],
        interval: int,
        judged: Collection[int] | None = None,
        every: int = SELDOM,
    ) -> None:
        self.windows, self.interval = sorted(set(windows)), interval
        seldom = interval * (1 if judged is None else every)
        rest = [w for w in self.windows if judged is not None and w not in judged]
        self._strides, self._records, self._periods = {}, {}, {}
        #: iterations by which the comparisons of a window lie behind the multiples of its stride
        self._behind = dict.fromkeys(self.windows, 0)
        for window in self.windows:
            stride = judged_stride(window, interval)
            if window in rest:
                stride = _multiple(seldom * len(rest), stride)
                self._behind[window] = seldom * rest.index(window)
            self._strides[window] = stride
            self._records[window] = _multiple(stride, seldom)
            self._periods[window] = _multiple(self._records[window], max(window, _APART * interval))
        self._last_use = lru_cache(self._uses_end)  # a sample asks for every snapshot that is held

    def stride(self, window: int) -> int:
        """Iterations between two comparisons of a window."""
        return self._strides[window]

    def record(self, window: int) -> int:
        """Iterations between two comparisons at which all is computed."""
        return self._records[window]

    def period(self, window: int) -> int:
        """Iterations between two records that share no step, fit to tell what persists."""
        return self._periods[window]

    def compared(self, iteration: int) -> list[int]:
        """The windows that are compared at an iteration."""
        return [w for w in self.windows if self._is_turn(w, iteration, self._strides)]

    def is_record(self, window: int, iteration: int) -> bool:
        """Whether all is computed at a comparison, not only what a rule judges."""
        return self._is_turn(window, iteration, self._records)

    def is_apart(self, window: int, iteration: int) -> bool:
        """Whether a record ends a period."""
        return self._is_turn(window, iteration, self._periods)

    def _is_turn(self, window: int, iteration: int, distance: dict[int, int]) -> bool:
        return (iteration - self._behind[window]) % distance[window] == 0

    def is_needed(self, snapshot: int, now: int) -> bool:
        """Whether a window will be compared, after ``now``, with the weights of ``snapshot``."""
        return self._last_use(snapshot) > now

    def _uses_end(self, snapshot: int) -> int:
        """The last iteration at which a window is compared with the weights of ``snapshot``."""
        uses = (snapshot + w for w in self.windows if self._is_turn(w, snapshot + w, self._strides))
        return max(uses, default=snapshot)

    def most_snapshots(self) -> int:
        """The largest number of snapshots that are held at once."""
        longest = self.windows[-1]
        cycle = longest * max(4 * SELDOM, *(s // self.interval for s in self._strides.values()))
        return max(
            sum(self.is_needed(at, now) for at in range(now, now - longest, -self.interval))
            for now in range(longest, longest + cycle, self.interval)
        )
