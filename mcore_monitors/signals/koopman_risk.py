"""The risk that a model diverges, from its spectral profile at initialization and learning rate.

A logistic model that was fitted on a study of training runs (``docs/koopman.md``) and written to
``koopman_risk.json`` beside this file by ``benchmarks/koopman_analysis.py --export``. It knows
nothing but what the study held: inputs that lie outside of it are named, and the probability is
then an extrapolation.

The table holds *inputs* (a feature or the learning rate, as it is or its logarithm, standardised
with the study's mean and spread, with the range that the study covered), *terms* (products of
inputs; an empty one is the intercept), the fitted *weights* of the terms with the calibration
folded in, and as many *draws* of them as runs were resampled.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What the study wrote.
TABLE = Path(__file__).with_name("koopman_risk.json")
#: Share of the draws between the two ends of the interval.
_COVERS = 0.95


@dataclass(frozen=True)
class Risk:
    """How likely this model at this learning rate is to diverge.

    Attributes:
        probability: of divergence, from 0 to 1; NaN where an input is not finite.
        low, high: ends of the 95% interval over resampled studies: how far the study's own size
            leaves the probability open, and nothing about models unlike those of the study.
        calibrated_on: the study, in a sentence.
        outside: one sentence for each input that lies outside of what the study covered; empty
            inside. With any, the probability is an extrapolation.
    """

    probability: float
    low: float
    high: float
    calibrated_on: str
    outside: list[str]


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def divergence_risk(features: Mapping[str, float], learning_rate: float) -> Risk:
    """The calibrated probability of divergence.

    Args:
        features: of the profile at initialization with all ``D`` modes and no residual filter,
            over the layers: each field of :class:`.koopman.Profile` as ``<field>_mean``,
            ``<field>_max``, ``<field>_min`` and ``<field>_std`` (population standard deviation).
            Those that the table does not use may be absent.
        learning_rate: the largest of the schedule.

    Raises:
        ValueError: a feature that is needed is missing, or the learning rate is not above zero.
    """
    return risk_from(_table(), features, learning_rate)


def risk_from(table: dict[str, Any], features: Mapping[str, float], learning_rate: float) -> Risk:
    """:func:`divergence_risk` with a given table."""
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: {learning_rate!r} cannot be used; allowed: above 0")
    given = {**features, "learning_rate": learning_rate}
    missing = [i["name"] for i in table["inputs"] if i["name"] not in given]
    if missing:
        raise ValueError(f"features: missing {', '.join(missing)}")
    values = {i["name"]: float(given[i["name"]]) for i in table["inputs"]}
    outside = [text for i in table["inputs"] if (text := _outside(i, values[i["name"]]))]
    scaled = {i["name"]: _scaled(i, values[i["name"]]) for i in table["inputs"]}
    if not all(map(math.isfinite, scaled.values())):
        return Risk(math.nan, 0.0, 1.0, table["calibrated_on"], outside)
    terms = [math.prod(scaled[name] for name in term) for term in table["terms"]]
    draws = sorted(_probability(weights, terms) for weights in table["draws"])
    probability = _probability(table["weights"], terms)
    tail = (1.0 - _COVERS) / 2.0
    return Risk(
        probability=probability,
        low=min(probability, draws[round(tail * (len(draws) - 1))]),
        high=max(probability, draws[round((1.0 - tail) * (len(draws) - 1))]),
        calibrated_on=table["calibrated_on"],
        outside=outside,
    )


def _outside(one: dict[str, Any], value: float) -> str | None:
    if not math.isfinite(value):
        return f"{one['name']} is not finite"
    if one["low"] <= value <= one["high"]:
        return None
    return f"{one['name']} {value:.3g} is outside of {one['low']:.3g} to {one['high']:.3g}"


def _scaled(one: dict[str, Any], value: float) -> float:
    if one["log"]:
        value = math.log(value) if 0 < value < math.inf else math.nan
    return (value - one["mean"]) / one["scale"]


def _probability(weights: list[float], terms: list[float]) -> float:
    logit = math.fsum(w * t for w, t in zip(weights, terms, strict=True))
    return 1.0 / (1.0 + math.exp(-logit)) if logit > -700 else 0.0
