"""The judge as a pure function of the history: replay equals the run, rollbacks included."""

from __future__ import annotations

import json

import pytest

from mcore_monitors.detection import DetectionConfig, Judge, Verdict
from mcore_monitors.sample import Sample
from tests.detection.series import (
    RANK,
    SHIFT,
    break_kernel,
    break_router,
    collapse,
    healthy,
)

LIMITS = {SHIFT: 1e-5}


def judge() -> Judge:
    return Judge(DetectionConfig(), LIMITS)


def recorded(run: list[Sample]) -> list[Sample]:
    return [Sample.from_record(json.loads(json.dumps(sample.to_record()))) for sample in run]


def faulty() -> list[Sample]:
    return break_router(collapse(break_kernel(healthy(0, 90), 600), 620), 640)


def test_replay_of_the_record_gives_the_verdicts_of_the_run():
    live = judge()
    verdicts = [live.update(sample) for sample in faulty()]
    assert judge().replay(recorded(faulty())) == verdicts
    assert sum(len(verdict.alarms) for verdict in verdicts) > 10


@pytest.mark.parametrize("cut", [30, 61, 62, 70])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(cut):
    run = faulty()
    whole = judge()
    expected = [whole.update(sample) for sample in run][cut:]
    resumed = judge()
    resumed.replay(recorded(run[:cut]))
    assert [resumed.update(sample) for sample in run[cut:]] == expected


def test_a_replay_starts_anew_so_that_a_rollback_takes_its_alarms_back():
    rolled_back, kept = judge(), healthy(0, 90)
    for sample in break_kernel(healthy(0, 90), 600)[:70]:
        rolled_back.update(sample)
    assert all(not verdict.active for verdict in rolled_back.replay(kept[:50]))
    assert all(not rolled_back.update(sample).active for sample in kept[50:])


def test_a_fault_is_told_once_and_again_when_more_is_known():
    run = faulty()
    verdicts = judge().replay(run)
    told = [
        (sample.iteration, verdict.diagnosis.cause)
        for sample, verdict in zip(run, verdicts, strict=True)
        if verdict.diagnosis
    ]
    assert told[0] == (620, "attention_numerics")
    assert told[-1][1] == "combined"
    assert len(told) <= 3
    alarms = [alarm for verdict in verdicts for alarm in verdict.alarms]
    cells = [(a.signal, a.layer, a.unit, a.severity) for a in alarms]
    assert len(cells) == len(set(cells))


def test_active_alarms_stay_in_the_verdict():
    last = judge().replay(faulty())[-1]
    assert not last.alarms and last.diagnosis is None
    assert last.standing.cause == "combined"
    assert {alarm.signal for alarm in last.active} >= {SHIFT, RANK}


def test_a_healthy_run_has_empty_verdicts():
    assert {verdict for verdict in judge().replay(healthy(9))} == {Verdict()}
