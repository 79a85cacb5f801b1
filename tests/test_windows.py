"""Windows of the update signals: their grid, and the snapshots that it takes."""

from __future__ import annotations

import pytest

from mcore_monitors.catalogue import is_judged
from mcore_monitors.windows import (
    SNAPSHOTS,
    compared,
    default_windows,
    is_needed,
    most_snapshots,
    stride,
    window_of,
)


@pytest.mark.parametrize("interval", [1, 3, 10, 50, 70, 1000])
def test_default_windows_are_multiples_and_different(interval: int) -> None:
    windows = default_windows(interval)
    assert windows == sorted(set(windows))
    assert all(window % interval == 0 for window in windows)


def test_strides_are_multiples_that_keep_a_window_to_few_snapshots() -> None:
    assert [stride(window, 10) for window in (10, 50, 60, 200)] == [10, 10, 20, 40]
    for interval in (1, 7, 10):
        for window in range(interval, 60 * interval, interval):
            step = stride(window, interval)
            assert step % interval == 0
            assert most_snapshots([window], interval) <= SNAPSHOTS
            # no finer grid would do with as few
            assert step == interval or window > SNAPSHOTS * (step - interval)


def test_what_a_comparison_needs_was_kept_until_then() -> None:
    windows, interval, held = [30, 70, 200], 10, set()
    longest = 0
    for now in range(10, 2000, interval):
        for window in compared(windows, interval, now):
            assert now - window in held or now <= window
        held = {s for s in held | {now} if is_needed(s, now, windows, interval)}
        longest = max(longest, len(held))
    assert longest == most_snapshots(windows, interval)


def test_default_windows_hold_nine_snapshots() -> None:
    assert most_snapshots([10, 50, 200], 10) == 9


def test_window_and_judgement_from_a_name() -> None:
    assert window_of("attention/delta2_effective_rank/rope@200") == 200
    assert window_of("attention/key_shift") is None
    assert is_judged("attention/delta2_effective_rank@50", [50])
    assert not is_judged("attention/delta2_effective_rank@10", [50])
    assert is_judged("attention/delta2_effective_rank/rope@10")
    assert is_judged("attention/key_shift", [])
    assert not is_judged("attention/unheard_of@50", [50])
