"""The windows of the update signals: how long, how often compared, which snapshots that needs.

A window of ``W`` iterations compares weights with those of ``W`` iterations ago, at every multiple
of its *stride*. The stride grows with the window, so that a window never needs more than
:data:`SNAPSHOTS` earlier weights, however long it is: windows of 10, 50 and 200 at interval 10 are
compared every 10, 10 and 40 iterations, and 9 snapshots serve all three instead of 20. Everything
counts absolute iterations, so a resumed run goes on with the same grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

#: Snapshots that one window needs at most.
SNAPSHOTS = 5
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


def stride(window: int, interval: int) -> int:
    """Iterations between two comparisons of a window, a multiple of ``interval``."""
    return interval * -(-window // (SNAPSHOTS * interval))


def compared(windows: Iterable[int], interval: int, iteration: int) -> list[int]:
    """The windows that are compared at an iteration."""
    return [window for window in windows if iteration % stride(window, interval) == 0]


def is_needed(snapshot: int, now: int, windows: Iterable[int], interval: int) -> bool:
    """Whether a window will yet be compared, after ``now``, with the weights of ``snapshot``."""
    return any(
        snapshot + window > now and (snapshot + window) % stride(window, interval) == 0
        for window in windows
    )


def most_snapshots(windows: Collection[int], interval: int) -> int:
    """The largest number of snapshots that are held at once."""
    period = max(windows)
    return max(
        sum(
            is_needed(snapshot, now, windows, interval)
            for snapshot in range(now - now % interval, now - period, -interval)
        )
        # strides divide into a common cycle; two windows' worth of it shows every phase
        for now in range(10 * period, 12 * period, interval)
    )


def window_of(signal: str) -> int | None:
    """The window in a signal's name: ``a/b@50`` gives 50, ``a/b`` None."""
    window = signal.partition("@")[2].partition("/")[0]
    return int(window) if window else None
