"""The band rule on healthy drifting courses and on faults laid over them."""

from __future__ import annotations

import math

import pytest

from mcore_monitors.detection.band import BandRule
from mcore_monitors.detection.config import DetectionConfig
from mcore_monitors.sample import Sample
from tests.detection.series import (
    CONDITIONING,
    ENTROPY,
    HEADS,
    RANK,
    break_router,
    collapse,
    declined,
    healthy,
)

CONFIG = DetectionConfig()


def run_rule(samples: list[Sample], config: DetectionConfig = CONFIG) -> list:
    rule = BandRule(config)
    return [alarm for sample in samples for alarm in rule.update(sample)]


def test_healthy_runs_with_drift_do_not_alarm():
    # 20 runs × 14 cells × about 115 judged samples: none of 32,000 readings.
    alarms = [alarm for seed in range(20) for alarm in run_rule(healthy(seed))]
    assert alarms == []


def test_a_healthy_decline_does_not_narrow_the_band_by_itself():
    """The remembered level lies above a run that has sunk; its reference must not be the top only.

    Judged from that level for admission, and by the last reference's spread alone, 35 of 40 such
    runs alarmed, most of them in the layer's mean.
    """
    alarmed = [seed for seed in range(100, 120) if run_rule(declined(seed))]
    assert len(alarmed) <= 2


@pytest.mark.parametrize("seed", range(8))
def test_collapse_of_one_head_is_found_at_its_place(seed):
    alarms = run_rule(collapse(healthy(seed, 100), 600))
    # the head itself, and where it pulls the layer's mean far enough, that too; nothing else
    assert {(a.signal, a.layer, a.unit) for a in alarms} - {(RANK, 2, None)} == {(RANK, 2, 2)}
    first = next(a for a in alarms if a.unit == 2)
    assert first.severity == "critical"
    assert 620 <= first.iteration <= 700
    assert 600 < first.onset_iteration <= first.iteration
    assert first.value < first.band["low"] < first.band["median"]
    assert first.band["high"] is None
    assert first.band["z"] < -CONFIG.threshold


@pytest.mark.parametrize("seed", range(8))
def test_all_heads_of_a_layer_down_together_are_seen_in_their_mean(seed):
    """To a half: at once for the mean; single heads may need many samples, or never alarm."""
    run = healthy(seed, 100)
    for sample in run:
        if sample.iteration > 600:
            sample.signals[RANK][1] = [0.5 * value for value in sample.signals[RANK][1]]
    (mean,) = (a for a in run_rule(run) if a.unit is None)
    assert (mean.signal, mean.layer, mean.iteration) == (RANK, 1, 630)
    assert "the mean over the layer" in mean.evidence


def test_a_rise_of_the_effective_rank_is_not_a_fault():
    run = healthy(1, 100)
    for sample in run:
        if sample.iteration > 600:
            sample.signals[RANK][1] = [3.0 * value for value in sample.signals[RANK][1]]
    assert run_rule(run) == []


def test_router_fault_warns_and_then_is_critical():
    alarms = run_rule(break_router(healthy(3, 100), 600))
    assert {alarm.signal for alarm in alarms} == {CONDITIONING, ENTROPY}
    assert min(alarm.iteration for alarm in alarms) <= 640
    assert {alarm.unit for alarm in alarms} == {None}
    ordered = [a.severity for a in alarms if (a.signal, a.layer) == (ENTROPY, 1)]
    assert ordered in (["warning", "critical"], ["critical"])


def test_nothing_is_judged_before_warm_up_and_twelve_references():
    early = DetectionConfig(warmup=200)
    # Reference samples 200..310 and two that wait: 340 is the first that can be judged.
    run = healthy(5, 60)
    for sample in run:
        if sample.iteration >= 330:
            sample.signals[RANK][1] = [0.01] * HEADS
    assert min(alarm.iteration for alarm in run_rule(run, early)) == 360
    for sample in run:
        sample.signals[RANK][1] = [0.01 if sample.iteration < 200 else 5.0] * HEADS
    assert run_rule(run, early) == []


def flat(samples: int, value: float = 5.0) -> list[Sample]:
    return [
        Sample(
            iteration=10 * (i + 1),
            attempt=0,
            time=0.0,
            consumed_samples=0,
            first_step=0,
            loss=[],
            grad_norm=[],
            learning_rate=1e-3,
            signals={RANK: {1: [value]}},
        )
        for i in range(samples)
    ]


def test_constant_series_is_not_infinitely_sensitive():
    run = flat(80)
    for sample in run[60:]:
        sample.signals[RANK][1] = [4.2]
    assert run_rule(run) == []


def test_two_bad_samples_are_not_enough_and_the_third_is():
    run = flat(80)
    for i in (60, 61, 63, 64):
        run[i].signals[RANK][1] = [2.0]
    assert run_rule(run) == []
    run[62].signals[RANK][1] = [2.0]
    (alarm,) = run_rule(run)
    assert (alarm.onset_iteration, alarm.iteration) == (610, 630)


def test_onset_goes_back_to_the_first_sample_on_the_way():
    run = flat(80)
    for i, value in ((60, 4.4), (61, 4.4), (62, 2.0), (63, 2.0), (64, 2.0)):
        run[i].signals[RANK][1] = [value]
    (alarm,) = run_rule(run)
    assert (alarm.onset_iteration, alarm.iteration) == (610, 650)


def test_missing_readings_neither_break_nor_make_a_streak():
    run = flat(80)
    for i, value in ((60, 2.0), (61, math.nan), (62, 2.0), (63, math.nan), (64, 2.0)):
        run[i].signals[RANK][1] = [value]
    (alarm,) = run_rule(run)
    assert (alarm.onset_iteration, alarm.iteration) == (610, 650)


def test_a_slow_fault_is_not_learnt_as_normal():
    # Down to a third over 60 samples, far slower than the reference rolls.
    run = healthy(2, 200)
    for sample in run:
        depth = min(1.0, max(0.0, (sample.iteration - 600) / 600))
        sample.signals[RANK][1][0] *= 3.0 ** (-1.5 * depth)
    alarms = run_rule(run)
    assert {(a.signal, a.layer, a.unit) for a in alarms} - {(RANK, 1, None)} == {(RANK, 1, 0)}


def test_an_alarmed_cell_is_silent_until_it_was_calm():
    run = flat(130)
    for i in (*range(60, 70), *range(72, 80), *range(95, 105)):
        run[i].signals[RANK][1] = [2.0]
    assert [alarm.iteration for alarm in run_rule(run)] == [630, 980]


def test_active_alarms_end_with_calm():
    rule = BandRule(CONFIG)
    run = flat(90)
    for i in range(60, 70):
        run[i].signals[RANK][1] = [2.0]
    for sample in run[:70]:
        rule.update(sample)
    assert len(rule.active()) == 1
    for sample in run[70:]:
        rule.update(sample)
    assert rule.active() == []


def test_a_cell_that_stays_away_for_long_has_a_new_normal():
    run = flat(60 + 100 + 60)
    for sample in run[60:]:
        sample.signals[RANK][1] = [2.0]
    for sample in run[-5:]:
        sample.signals[RANK][1] = [0.7]
    alarms = run_rule(run)
    assert [alarm.iteration for alarm in alarms] == [630, 2180]
    assert alarms[1].band["median"] == pytest.approx(2.0)


@pytest.mark.parametrize("factor, expected", [(0.5, []), (2.0, [630])])
def test_only_a_fall_of_the_learning_rate_starts_a_new_reference(factor, expected):
    run = flat(90)
    for sample in run[60:]:
        sample.learning_rate = 1e-3 * factor
        sample.signals[RANK][1] = [2.0]
    assert [alarm.iteration for alarm in run_rule(run)] == expected


def test_signals_of_another_version_are_left_alone():
    run = flat(80)
    for sample in run:
        sample.signals["attention/from_the_future@9"] = {1: [1.0 / sample.iteration]}
    assert run_rule(run) == []


def test_samples_without_a_reading_change_nothing():
    """A long window is compared at some samples only; the judge sees those and nothing between."""
    run = collapse(healthy(3, 600), 4000)
    kept = [sample for sample in run if sample.iteration % 40 == 0]
    wanted = [a for a in run_rule(kept) if a.signal == RANK]
    for sample in run:
        if sample.iteration % 40:
            del sample.signals[RANK]
    alarms = [a for a in run_rule(run) if a.signal == RANK]
    assert alarms == wanted
    assert any(a.unit == 2 and a.layer == 2 and a.iteration % 40 == 0 for a in alarms)


def test_a_window_that_is_not_judged_raises_no_alarm():
    run = collapse(healthy(0, 100), 600)
    assert any(a.signal == RANK for a in run_rule(run, DetectionConfig(windows=[50, 200])))
    assert run_rule(run, DetectionConfig(windows=[200])) == []
    rule = BandRule(DetectionConfig(windows=[]))
    for sample in run:
        rule.update(sample)
    assert "attention/delta2_effective_rank" not in rule.judged
