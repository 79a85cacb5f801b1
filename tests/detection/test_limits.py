"""The limit rule: at work from the first sample, two in a row, no repetition."""

from __future__ import annotations

import math

import pytest

from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.detection.limits import LimitRule
from mcore_monitors.sample import Sample
from tests.detection.series import RANK, SHIFT

LIMITS = {SHIFT: 1e-5}


def run_rule(values: list[float], rule: LimitRule | None = None) -> list:
    rule = rule or LimitRule(DetectionConfig(), LIMITS)
    alarms = []
    for i, value in enumerate(values):
        alarms += rule.update(
            Sample(
                iteration=10 * (i + 1),
                attempt=0,
                time=0.0,
                consumed_samples=0,
                first_step=0,
                loss=[],
                grad_norm=[],
                learning_rate=None,
                signals={SHIFT: {3: [5e-8, value]}},
            )
        )
    return alarms


def test_the_second_sample_over_the_limit_alarms_and_names_the_first():
    (alarm,) = run_rule([5e-8, 2e-3, 3e-3, 4e-3])
    assert (alarm.iteration, alarm.onset_iteration) == (30, 20)
    assert (alarm.signal, alarm.layer, alarm.unit) == (SHIFT, 3, 1)
    assert (alarm.severity, alarm.rule, alarm.value, alarm.limit) == (
        "critical",
        "limit",
        3e-3,
        1e-5,
    )
    assert "300 times the limit of 1.00e-05" in alarm.evidence


def test_one_sample_over_the_limit_is_not_enough():
    assert run_rule([2e-3, 5e-8, 2e-3, 5e-8]) == []


def test_the_limit_itself_is_within():
    assert run_rule([1e-5] * 5) == []


def test_a_value_that_is_not_finite_changes_nothing():
    (alarm,) = run_rule([2e-3, math.nan, math.inf, 3e-3])
    assert (alarm.iteration, alarm.onset_iteration) == (40, 10)


def test_a_cell_alarms_again_only_after_four_quiet_samples():
    bad, good = 2e-3, 5e-8
    values = [bad, bad, good, good, good, bad, bad, good, good, good, good, bad, bad]
    assert [alarm.iteration for alarm in run_rule(values)] == [20, 130]


def test_active_until_calm():
    rule = LimitRule(DetectionConfig(), LIMITS)
    run_rule([2e-3, 2e-3, 5e-8, 5e-8, 5e-8], rule)
    assert [alarm.unit for alarm in rule.active()] == [1]
    run_rule([5e-8], rule)
    assert rule.active() == []


@pytest.mark.parametrize("limit, count", [(1e-2, 0), (1e-9, 2)])
def test_a_configured_limit_wins_over_that_of_the_format(limit, count):
    rule = LimitRule(DetectionConfig(limit=limit), LIMITS)
    assert len(run_rule([2e-3, 2e-3], rule)) == count


def test_a_residual_without_a_limit_is_not_judged():
    rule = LimitRule(DetectionConfig())
    assert run_rule([1.0, 1.0, 1.0], rule) == []
    assert rule.judged == set()


def test_the_name_of_a_limit_carries_no_window():
    rule = LimitRule(DetectionConfig(), LIMITS)
    assert rule.limit(f"{SHIFT}@20") == 1e-5
    assert rule.limit(RANK) is None


def test_limits_by_name_win_and_the_others_stay():
    config = DetectionConfig(limit={SHIFT: 1e-2})
    rule = LimitRule(config, LIMITS | {"norm/scale": 1e-4})
    assert (rule.limit(SHIFT), rule.limit("norm/scale")) == (1e-2, 1e-4)


def test_one_number_for_all_does_not_hold_for_directions():
    rule = LimitRule(DetectionConfig(limit=1e-2), {"attention/key_shift_bias": 14.0})
    assert (rule.limit(SHIFT), rule.limit("attention/key_shift_bias")) == (1e-2, 14.0)


def test_sizes_are_the_last_finite_values_over_their_limits():
    rule = LimitRule(DetectionConfig(), LIMITS)
    run_rule([2e-5, math.nan], rule)
    (sizes,) = rule.sizes[SHIFT].values()
    assert sizes[1] == pytest.approx(2.0)


def test_a_history_with_another_number_of_units_does_not_stop_the_rule():
    """After an upgrade a layer may have a reading a query group where it had one a head."""
    rule = LimitRule(DetectionConfig(), LIMITS)
    assert run_rule([5e-8], rule) == []

    def sample(iteration: int, values: list[float]) -> Sample:
        return Sample(
            iteration=iteration,
            attempt=0,
            time=0.0,
            consumed_samples=0,
            first_step=0,
            loss=[],
            grad_norm=[],
            learning_rate=None,
            signals={SHIFT: {3: values}},
        )

    wide = [5e-8, 5e-8, 5e-8, 2e-3]
    assert rule.update(sample(20, wide)) == []
    (alarm,) = rule.update(sample(30, wide))
    assert (alarm.unit, alarm.onset_iteration) == (3, 20)
