"""Windows of the update signals: their grid, and the snapshots that it takes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mcore_monitors.catalogue import is_judged
from mcore_monitors.windows import (
    SNAPSHOTS,
    Grid,
    default_judged,
    default_windows,
    judged_stride,
    window_of,
)


@pytest.mark.parametrize("interval", [1, 3, 10, 50, 70, 1000])
def test_default_windows_are_multiples_and_different(interval: int) -> None:
    windows = default_windows(interval)
    assert windows == sorted(set(windows))
    assert all(window % interval == 0 for window in windows)
    assert default_judged(windows)[0] in windows


def test_strides_are_multiples_that_keep_a_window_to_few_snapshots() -> None:
    assert [judged_stride(window, 10) for window in (10, 50, 60, 200)] == [10, 10, 20, 40]
    for interval in (1, 7, 10):
        for window in range(interval, 40 * interval, 3 * interval):
            step = judged_stride(window, interval)
            assert step % interval == 0
            assert Grid([window], interval).most_snapshots() <= SNAPSHOTS
            # no finer grid would do with as few
            assert step == interval or window > SNAPSHOTS * (step - interval)


def test_windows_that_are_not_judged_take_turns_at_every_tenth_sample() -> None:
    grid = Grid([10, 50, 200], 10, [50])
    found = {iteration: grid.compared(iteration) for iteration in range(10, 410, 10)}
    assert {i: windows for i, windows in found.items() if windows != [50]} == {
        100: [50, 200],
        200: [10, 50],
        300: [50, 200],
        400: [10, 50],
    }
    assert [i for i in found if grid.is_record(50, i)] == [100, 200, 300, 400]
    assert all(grid.is_record(w, i) for i, windows in found.items() for w in windows if w != 50)
    assert grid.most_snapshots() == 6
    assert Grid([10, 50, 200], 10, [50], every=5).most_snapshots() == 7


def test_all_is_recorded_at_every_comparison_where_all_is_asked_for() -> None:
    grid = Grid([10, 200], 10)
    assert all(grid.is_record(10, i) for i in range(10, 410, 10))
    assert all(grid.is_record(200, i) for i in range(40, 440, 40))
    assert [Grid([50], 10, [50], every).is_record(50, 40) for every in (1, 3)] == [True, False]


@pytest.mark.parametrize("judged", [None, [70], []])
def test_what_a_comparison_needs_was_kept_until_then(judged: list[int] | None) -> None:
    grid, held, longest = Grid([30, 70, 200], 10, judged), set(), 0
    for now in range(10, 4000, 10):
        for window in grid.compared(now):
            assert now - window in held or now <= window
        held = {at for at in held | {now} if grid.is_needed(at, now)}
        longest = max(longest, len(held))
    assert longest == grid.most_snapshots()


def test_periods_share_no_step_and_lie_on_the_grid() -> None:
    for judged in (None, [50], []):
        grid = Grid([10, 50, 70, 200], 10, judged)
        for window in grid.windows:
            assert grid.period(window) >= window
            assert grid.period(window) % grid.stride(window) == 0
            apart = [i for i in range(10, 4000, 10) if grid.is_apart(window, i)]
            assert all(grid.is_record(window, i) for i in apart)
            assert {b - a for a, b in pairwise(apart)} == {grid.period(window)}


def test_window_and_judgement_from_a_name() -> None:
    assert window_of("attention/delta2_effective_rank/rope@200") == 200
    assert window_of("attention/key_shift") is None
    assert is_judged("attention/delta2_effective_rank@50", [50])
    assert not is_judged("attention/delta2_effective_rank@10", [50])
    assert is_judged("attention/delta2_effective_rank/rope@10")
    assert is_judged("attention/key_shift", [])
    assert not is_judged("attention/unheard_of@50", [50])
