"""The risk of a profile: the formula of the table, its interval, and what lies outside of it."""

from __future__ import annotations

import math

import pytest

from mcore_monitors.signals.koopman_risk import TABLE, divergence_risk, risk_from

INPUT = {"mean": 0.0, "scale": 1.0, "low": 0.0, "high": 1.0, "log": False}
SMALL = {
    "calibrated_on": "nothing",
    "inputs": [
        INPUT | {"name": "near_unit_mean", "mean": 0.5, "scale": 0.25},
        INPUT | {"name": "learning_rate", "mean": math.log(0.01), "low": 0.001, "log": True},
    ],
    "terms": [[], ["near_unit_mean"], ["learning_rate", "near_unit_mean"]],
    "weights": [0.5, 2.0, -1.0],
    "draws": [[0.5 + 0.01 * i, 2.0, -1.0] for i in range(-100, 101)],
}


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_formula_and_its_interval() -> None:
    risk = risk_from(SMALL, {"near_unit_mean": 0.75, "unused": 3.0}, 0.02)
    logit = 0.5 + 2.0 * 1.0 - 1.0 * math.log(2) * 1.0
    assert risk.probability == pytest.approx(logistic(logit))
    assert risk.low == pytest.approx(logistic(logit - 0.95), abs=1e-6)
    assert risk.high == pytest.approx(logistic(logit + 0.95), abs=1e-6)
    assert (risk.calibrated_on, risk.outside) == ("nothing", [])


def test_what_lies_outside_is_named() -> None:
    risk = risk_from(SMALL, {"near_unit_mean": 1.5}, 2e-4)
    assert risk.outside == [
        "near_unit_mean 1.5 is outside of 0 to 1",
        "learning_rate 0.0002 is outside of 0.001 to 1",
    ]
    assert 0 < risk.probability < 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_no_risk(value: float) -> None:
    risk = risk_from(SMALL, {"near_unit_mean": value}, 0.02)
    assert math.isnan(risk.probability)
    assert (risk.low, risk.high) == (0.0, 1.0)
    assert risk.outside == ["near_unit_mean is not finite"]


def test_extremes_are_probabilities() -> None:
    for mass in (1e6, -1e6):
        assert risk_from(SMALL, {"near_unit_mean": mass}, 0.01).probability in (0.0, 1.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        risk_from(SMALL, {"near_unit_mean": 0.5}, 0.0)
    with pytest.raises(ValueError, match="missing near_unit_mean"):
        risk_from(SMALL, {}, 0.01)


def test_the_packages_table() -> None:
    assert TABLE.exists()
    bare = {"near_unit_mean": 0.99, "near_unit_std": 0.01, "super_unit_mean": 0.01}
    bare |= {"spectral_radius_max": 1.05, "condition_mean": 300.0, "nonlinearity_mean": 0.2}
    fast = divergence_risk(bare, 0.02)
    assert fast.low <= fast.probability <= fast.high
    assert "trainings on associative recall" in fast.calibrated_on
    assert not fast.outside
    assert divergence_risk(bare, 10.0).outside
