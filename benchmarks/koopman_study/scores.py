"""How well a score tells runs that diverged from those that did not."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

#: score → (field of a row, sign with which a larger value means more risk)
SCORES: dict[str, tuple[str, int]] = {
    "near-unit mass": ("near_unit_mean", 1),
    "spectral radius": ("spectral_radius_mean", 1),
    "κ(V)": ("condition_mean", 1),
    "Kreiss constant": ("kreiss_mean", 1),
    "nonlinearity η": ("nonlinearity_mean", 1),
    "super-unit mass": ("super_unit_mean", 1),
    "initial gradient norm": ("first_norm", 1),
    "loss spikes in warm-up": ("loss_spikes_warmup", 1),
    "learning rate": ("learning_rate", 1),
    "initial scale": ("init_scale", 1),
    "layers": ("layers", 1),
}


def pairs(score: NDArray, diverged: NDArray) -> tuple[float, int]:
    """How many pairs of a diverged and another run the score puts right (ties half), of all."""
    high, low = score[diverged], score[~diverged]
    if not len(high) or not len(low):
        return 0.0, 0
    right = (high[:, None] > low[None]).sum() + 0.5 * (high[:, None] == low[None]).sum()
    return float(right), len(high) * len(low)


def auroc(score: NDArray, diverged: NDArray, strata: Sequence[Hashable] | None = None) -> float:
    """Area under the receiver operating characteristic: the share of pairs put right.

    Args:
        strata: compare runs of one stratum only, and add the pairs of all strata up.

    Returns:
        NaN where no pair exists: all runs (of each stratum) ended alike.
    """
    if strata is None:
        right, total = pairs(score, diverged)
        return right / total if total else float("nan")
    right, total = 0.0, 0
    labels = np.array([hash(s) for s in strata])
    for label in np.unique(labels):
        part = labels == label
        more = pairs(score[part], diverged[part])
        right, total = right + more[0], total + more[1]
    return right / total if total else float("nan")


def with_interval(
    score: NDArray,
    diverged: NDArray,
    strata: Sequence[Hashable] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, float | int | None]:
    """AUROC with a 95% interval over resampled runs; None where it is not defined."""
    value = auroc(score, diverged, strata)
    if np.isnan(value):
        return {"auroc": None, "low": None, "high": None}
    random = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = random.integers(0, len(score), len(score))
        again = None if strata is None else [strata[i] for i in chosen]
        found.append(auroc(score[chosen], diverged[chosen], again))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return {"auroc": value, "low": float(low), "high": float(high)}


def calibration_error(probability: NDArray, diverged: NDArray, bins: int = 10) -> float:
    """Expected calibration error: mean over runs of |share diverged − mean probability| in bins."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    total = 0.0
    for i in range(bins):
        part = which == i
        if part.any():
            total += part.sum() * abs(diverged[part].mean() - probability[part].mean())
    return total / len(probability)


def reliability(probability: NDArray, diverged: NDArray, bins: int = 10) -> list[dict]:
    """Runs, mean probability and share that diverged in each bin that holds a run."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        {
            "runs": int(part.sum()),
            "predicted": float(probability[part].mean()),
            "diverged": float(diverged[part].mean()),
        }
        for i in range(bins)
        if (part := which == i).any()
    ]
