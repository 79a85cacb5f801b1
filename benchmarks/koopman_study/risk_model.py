"""The calibrated model of the risk: fitted, held out, and written down for the package.

Logistic regression on standardised inputs and on the product of each with the logarithm of the
learning rate, L2-penalised; the penalty is chosen by cross-validation inside of the training runs.
A sigmoid or isotonic map of its out-of-fold scores, again inside of the training runs, calibrates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

#: Input → whether its logarithm is taken. Only what a profile sees, and the learning rate.
INPUTS: dict[str, bool] = {
    "learning_rate": True,
    "near_unit_mean": False,
    "near_unit_std": False,
    "super_unit_mean": False,
    "spectral_radius_max": True,
    "condition_mean": True,
    "nonlinearity_mean": True,
}
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 4


def inputs_of(rows: list[dict], names: list[str]) -> NDArray:
    """[runs, inputs], logarithms taken."""
    columns = [np.array([float(row[name]) for row in rows]) for name in names]
    return np.stack(
        [np.log(c) if INPUTS[n] else c for n, c in zip(names, columns, strict=True)], axis=1
    )


def terms_of(names: list[str]) -> list[list[str]]:
    """The intercept, each input, and its product with the learning rate."""
    rate = ["learning_rate"] if "learning_rate" in names else []
    return [[], *([n] for n in names), *([*rate, n] for n in names if rate)]


class Terms(BaseEstimator):
    """Inputs to terms (without the intercept); a step of a scikit-learn pipeline.

    Args:
        names: of the inputs.
        mean, scale: [inputs] to standardise with; None: those of the runs it is fitted on.
    """

    def __init__(
        self, names: list[str], mean: NDArray | None = None, scale: NDArray | None = None
    ) -> None:
        self.names, self.mean, self.scale = names, mean, scale

    def fit(self, inputs: NDArray, _: Any = None) -> Terms:
        """Keep the runs' mean and spread, where none are given."""
        spread = inputs.std(0)
        given = self.mean is not None
        self.mean_ = self.mean if given else inputs.mean(0)
        self.scale_ = self.scale if given else np.where(spread > 1e-9, spread, 1.0)
        return self

    def transform(self, inputs: NDArray) -> NDArray:
        """[runs, terms]."""
        scaled = (inputs - self.mean_) / self.scale_
        place = {name: i for i, name in enumerate(self.names)}
        terms = [scaled[:, [place[n] for n in t]].prod(1) for t in terms_of(self.names)[1:]]
        return np.stack(terms, axis=1)


def _folds(seed: int) -> StratifiedKFold:
    return StratifiedKFold(FOLDS, shuffle=True, random_state=seed)


def _pipeline(terms: Terms, penalty: float) -> Any:
    return make_pipeline(terms, StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))


def can_learn(diverged: NDArray) -> bool:
    """Whether there are enough runs of both ends for cross-validation."""
    return min(diverged.sum(), (~diverged).sum()) >= FOLDS


def choose_penalty(inputs: NDArray, diverged: NDArray, names: list[str], seed: int = 0) -> float:
    """The penalty with the least log loss over folds of the training runs."""

    def loss(penalty: float) -> float:
        found = cross_val_predict(
            _pipeline(Terms(names), penalty), inputs, diverged, cv=_folds(seed),
            method="predict_proba",
        )[:, 1].clip(1e-6, 1 - 1e-6)  # fmt: skip
        return -float(np.where(diverged, np.log(found), np.log(1 - found)).mean())

    return min(PENALTIES, key=loss)


def calibrated(
    inputs: NDArray, diverged: NDArray, terms: Terms, penalty: float, method: str, seed: int = 0
) -> CalibratedClassifierCV:
    """The model of all given runs; ``method`` is "sigmoid" or "isotonic"."""
    return CalibratedClassifierCV(
        _pipeline(terms, penalty), method=method, cv=_folds(seed), ensemble=False
    ).fit(inputs, diverged)


def held_out(
    rows: list[dict], parts: list[Any], names: list[str], method: str, seed: int = 0
) -> NDArray:
    """Probability of each run from a model that has not seen the runs of its part.

    NaN where the other parts hold too few runs of one end to learn from.
    """
    inputs, diverged = inputs_of(rows, names), ends(rows)
    found = np.full(len(rows), np.nan)
    labels = np.array([str(p) for p in parts])
    for label in np.unique(labels):
        out = labels == label
        if can_learn(diverged[~out]):
            known = inputs[~out], diverged[~out]
            penalty = choose_penalty(*known, names, seed)
            model = calibrated(*known, Terms(names), penalty, method, seed)
            found[out] = model.predict_proba(inputs[out])[:, 1]
    return found


def ends(rows: list[dict]) -> NDArray:
    """[runs] whether each diverged."""
    return np.array([row["diverged_at"] is not None for row in rows])


def _weights(model: CalibratedClassifierCV) -> list[float]:
    """The weights of the terms with scaling and calibration folded in, the intercept first."""
    (whole,) = model.calibrated_classifiers_
    _, scaler, logistic = (step for _, step in whole.estimator.steps)
    (sigmoid,) = whole.calibrators
    slope = logistic.coef_[0] / scaler.scale_
    base = logistic.intercept_[0] - float(slope @ scaler.mean_)
    # Platt's sigmoid is 1/(1 + exp(a·score + b)).
    return [-(sigmoid.a_ * base + sigmoid.b_), *(-sigmoid.a_ * slope)]


def table(
    rows: list[dict], names: list[str], calibrated_on: str, draws: int = 200, seed: int = 0
) -> dict[str, Any]:
    """What the package reads: see ``mcore_monitors/signals/koopman_risk.py``.

    Each draw resamples the runs and fits anew, with the standardisation and penalty of the whole.
    """
    inputs, diverged = inputs_of(rows, names), ends(rows)
    penalty = choose_penalty(inputs, diverged, names, seed)
    units = Terms(names).fit(inputs)
    fixed = Terms(names, units.mean_, units.scale_)
    weights = _weights(calibrated(inputs, diverged, fixed, penalty, "sigmoid", seed))
    random = np.random.default_rng(seed)
    found: list[list[float]] = []
    while len(found) < draws:
        chosen = random.integers(0, len(rows), len(rows))
        if can_learn(diverged[chosen]):
            drawn = calibrated(inputs[chosen], diverged[chosen], fixed, penalty, "sigmoid", seed)
            found.append(_weights(drawn))
    # not from the logarithms, whose rounding would put the study's own ends outside
    seen = {name: [float(row[name]) for row in rows] for name in names}
    return {
        "calibrated_on": calibrated_on,
        "inputs": [
            {
                "name": name,
                "log": INPUTS[name],
                "mean": round(float(units.mean_[i]), 6),
                "scale": round(float(units.scale_[i]), 6),
                "low": min(seen[name]),
                "high": max(seen[name]),
            }
            for i, name in enumerate(names)
        ],
        "terms": terms_of(names),
        "weights": [round(float(w), 5) for w in weights],
        "draws": [[round(float(w), 4) for w in row] for row in found],
    }
