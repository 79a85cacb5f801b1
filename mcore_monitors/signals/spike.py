"""The coherent part of an update against its noise, without a healthy run to compare with.

Over a window a weight moves by ΔW = C + N: a coherent part of few directions, which grows with the
number of steps, and the sum of the steps' noise, which grows with its root. Were N white, the
eigenvalues of its Gram matrix would fill the Marchenko–Pastur law of the matrix's shape and nothing
beyond its edge; a coherent direction that is strong enough stands out as an outlying value, and how
far it stands out says how strong it is (Baik, Ben Arous and Péché 2005; Benaych-Georges and
Nadakuditi 2012). The strength is given as ‖C‖_F/‖N‖_F, on whose scale the effective rank starts to
narrow near 0.3 and has collapsed near 1 (docs/attention_update.md).

Real noise is not white: activations have directions of their own, and healthy training is coherent
too. Outlying values alone are no fault. In white noise a fault is an outlying value *and* a
direction that stays (:func:`persistent_spike`), where an update of low rank has a direction of its
own each time; in a real training that pair may be healthy as well, and what tells is a strength
that rises over the run's own level (measured in docs/attention_update.md).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

#: Quantile of the Tracy–Widom law for real matrices (β = 1) at 0.999: one healthy white matrix in a
#: thousand has a value beyond it. Published: 0.95 → 0.9793, 0.99 → 2.0234, 0.999 → 3.2724.
TRACY_WIDOM_0_999 = 3.2724


class Spike(NamedTuple):
    """Coherent part of one matrix each, shaped like the spectra without their last dimension."""

    strength: Tensor
    """Estimate of ‖C‖_F/‖N‖_F for the leading direction; 0 where no value is outlying."""
    outliers: Tensor
    """Number of singular values beyond the edge of the noise."""


def spike(singular_values_squared: Tensor, columns: int) -> Spike:
    """Strength and number of the singular values that stand out of a white-noise bulk.

    Args:
        singular_values_squared: [..., d], descending, of matrices ΔW [d, D].
        columns: D.

    Returns:
        :class:`Spike` of shape [...], float64; NaN for a matrix that is not finite or that did not
        move, both fields.

    The scale of the noise is the median eigenvalue over the median of the Marchenko–Pastur law, so
    up to a few coherent directions do not move it. The edge is that of Johnstone (2001) at the
    Tracy–Widom level of 0.1%. A matrix of which half or more directions did not move at all has no
    bulk: all of it is then outlying, and the strength infinite.
    """
    rows = singular_values_squared.shape[-1]
    n, m = min(rows, columns), max(rows, columns)
    values = singular_values_squared.double()
    if n < rows:
        values = values[..., :n]
    ratio = n / m
    noise = _median(values) / _marchenko_pastur_median(ratio)  # m σ², σ² that of one element
    outliers = (values > noise * (_edge(n, m) / m)).sum(-1, dtype=torch.float64)
    # λ = (1 + x)(ratio + x)/x for a coherent singular value θ with x = θ²/(σ² m)
    excess = (values[..., :1] / noise).squeeze(-1) - (1 + ratio)
    twice_x = excess + (excess * excess - 4 * ratio).clamp_(min=0).sqrt()
    strength = (twice_x / (2 * n)).clamp_(min=0).sqrt()  # negative only where none is outlying
    total = values.sum(-1)
    one = total / total  # NaN where nothing moved or a value is not finite
    return Spike(strength * (outliers > 0) * one, outliers * one)


def persistent_spike(
    outliers: Tensor, overlaps: Tensor, *, overlap_at_least: float = 0.5
) -> Tensor:
    """Whether a head's update is coherent *and* keeps its direction, as a biased fault's does.

    Args:
        outliers: [S, ...], outlying singular values at S samples (:func:`spike`), of one matrix or
            the larger of several.
        overlaps: [S − 1, ...], overlap of the leading directions of each sample but the first with
            those of the sample before (:func:`mcore_monitors.signals.direction.direction_overlap`).
            Samples are at least one window apart, so that no two of them share a step.
        overlap_at_least: |cos| that counts as the same direction. A coherent part of strength s
            in [d, D] noise leaves s²d/(1 + s²d) of it to two samples at D ≫ d: 0.94 at s = 0.5 and
            d = 64, 0.67 at d = 8. Independent directions have about 1.5/√D.

    Returns:
        [...], bool: every sample has an outlying value and every overlap is large enough. Not
        finite counts as no.
    """
    if overlaps.shape[0] != outliers.shape[0] - 1 or not overlaps.shape[0]:
        raise ValueError(
            f"S ≥ 2 samples have S − 1 overlaps, got {outliers.shape[0]} and {overlaps.shape[0]}"
        )
    return (outliers.amin(0) >= 1) & (overlaps.amin(0) >= overlap_at_least)


def _median(values: Tensor) -> Tensor:
    """[..., 1], mean of the one or two middle values of the last dimension, which is in order."""
    n = values.shape[-1]
    first, last = (n - 1) // 2, n // 2
    return values[..., first : last + 1].sum(-1, keepdim=True) / (last + 1 - first)


def _edge(n: int, m: int) -> float:
    """Largest eigenvalue of X Xᵀ, X [n, m] of unit white noise, exceeded once in a thousand."""
    a, b = math.sqrt(m - 1), math.sqrt(n)
    return (a + b) ** 2 + TRACY_WIDOM_0_999 * (a + b) * (1 / a + 1 / b) ** (1 / 3)


@lru_cache
def _marchenko_pastur_median(ratio: float) -> float:
    """Median eigenvalue of X Xᵀ/m for X [n, m] of unit white noise with n/m = ratio ≤ 1."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # With λ = middle + radius·cos t the density is smooth in t, and the midpoint rule exact enough.
    steps = 20_000
    middle, radius = (low + high) / 2, (high - low) / 2
    total, cells = 0.0, []
    for i in range(steps):
        t = math.pi * (1 - (i + 0.5) / steps)  # λ ascending
        value = middle + radius * math.cos(t)
        total += math.sin(t) ** 2 / value
        cells.append((value, total))
    return next(value for value, mass in cells if mass >= total / 2)
