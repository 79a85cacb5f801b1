"""The published rules, against dumb loops that follow their authors' code step by step."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from mcore_monitors.detection.baselines import RULES, first_alarm, scan


def dumb_olmo(values: list[float]) -> list[int]:
    fires, window = [], []
    for i, latest in enumerate(values):
        window = [*window, latest][-129:]
        if len(window) < 64:
            continue
        before = window[:-1]
        mean = sum(before) / len(before)
        variance = sum((x - mean) ** 2 for x in before) / (len(before) - 1)
        if abs(latest - mean) > 6 * math.sqrt(variance):
            fires.append(i)
    return fires


def dumb_zclip(values: list[float]) -> list[int]:
    fires, warm, mean, variance = [], [], None, None
    for i, norm in enumerate(values):
        if mean is None:
            warm.append(norm)
            if len(warm) == 25:
                mean, variance = statistics.fmean(warm), statistics.pvariance(warm)
            continue
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        if z > 2.5:
            fires.append(i)
            norm = mean + 2.5 * math.sqrt(variance) / (z / 2.5)
        mean = 0.97 * mean + 0.03 * norm
        variance = 0.97 * variance + 0.03 * (norm - mean) ** 2
    return fires


def dumb_spiky(values: list[float]) -> list[int]:
    return [i for i, x in enumerate(values) if i >= 100 and abs(x) >= 10 * max(values[:100])]


def spiky_run(seed: int, steps: int) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(seed)
    loss = 2.0 + 4.0 * np.exp(-np.arange(steps) / 200.0) + generator.normal(0.0, 0.05, steps)
    norm = np.exp(generator.normal(0.0, 0.2, steps))
    for column, size in ((loss, 1.0), (norm, 6.0)):
        column[generator.choice(steps, 12, replace=False)] += size
    loss[-1] = 90.0
    return loss.tolist(), norm.tolist()


@pytest.mark.parametrize("seed, steps", [(0, 900), (1, 128), (2, 129), (3, 70), (4, 20), (5, 1)])
def test_the_fast_rules_fire_where_the_dumb_loops_do(seed, steps):
    loss, norm = spiky_run(seed, max(steps, 40))
    loss, norm = loss[-steps:], norm[-steps:]
    found = scan(loss, norm, first_iteration=0)
    assert found == {
        "olmo_loss": dumb_olmo(loss),
        "olmo_grad_norm": dumb_olmo(norm),
        "zclip_grad_norm": dumb_zclip(norm),
        "megatron_spiky_loss": dumb_spiky(loss),
    }
    if steps == 900:
        assert all(found.values())


def test_a_long_history_is_worked_on_in_pieces():
    loss, norm = spiky_run(7, 9000)
    found = scan(loss, norm, first_iteration=0)
    assert found["olmo_loss"] == dumb_olmo(loss)
    assert found["olmo_grad_norm"] == dumb_olmo(norm)


def test_iterations_are_absolute_and_unknown_steps_are_passed_over():
    loss, norm = spiky_run(0, 900)
    plain = scan(loss, norm)
    holes = [None if i in (200, 201, 444) else x for i, x in enumerate(norm)]
    shifted = scan([math.nan, *loss], [None, *holes], first_iteration=1000)
    assert plain == scan(loss, norm, first_iteration=1)
    assert shifted["olmo_loss"] == [i + 1000 for i in plain["olmo_loss"]]
    kept = [x for x in holes if x is not None]
    where = [i for i, x in enumerate(holes) if x is not None]
    assert shifted["zclip_grad_norm"] == [1001 + where[i] for i in dumb_zclip(kept)]


def test_a_constant_history_fires_nowhere():
    assert scan([2.0] * 300, [1.0] * 300) == {rule: [] for rule in RULES}


def test_nothing_at_all():
    assert scan([], []) == {rule: [] for rule in RULES}


def test_an_alarm_is_firing_more_densely_than_in_health():
    healthy = [210, 230, 231, 400]
    assert first_alarm([100, 610, 650, 653, 655, 658], 600, healthy) == 655
    assert first_alarm([610, 650, 690, 730], 600, healthy) is None
    assert first_alarm([590, 599, 600, 640], 600, []) == 640
    assert first_alarm([], 600, healthy) is None
