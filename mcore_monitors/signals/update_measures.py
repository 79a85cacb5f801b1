"""How many directions the updates of queries and keys have, and how strong they are.

The four measures of :mod:`.spectra` for the four matrices of :mod:`.update_spectra`, from their
singular values or, where that is faster, without them (:mod:`.gram_measures`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram_measures import LEAST_ROWS, LEAST_WORK, measures_by_traces
from .spectra import Measures, measures
from .update_grams import UpdateGrams, update_grams
from .update_spectra import (
    delta2_product,
    gram_eigenvalues,
    gram_eigenvalues_ascending,
    products,
)


class UpdateMeasures(NamedTuple):
    """Measures, float64; NaN where a weight is not finite, and but for the norm where all is 0."""

    delta2: Measures
    """[H], of ΔW_qᵀ W_k + W_qᵀ ΔW_k."""
    delta3: Measures
    """[H], of ΔW_qᵀ ΔW_k."""
    query: Measures
    """[H], of ΔW_q."""
    key: Measures
    """[G], of ΔW_k."""


@torch.no_grad()
def update_measures(
    wq_old: Tensor, wk_old: Tensor, wq_new: Tensor, wk_new: Tensor
) -> UpdateMeasures:
    """The measures of Δ2, Δ3, ΔW_q and ΔW_k of each head, in float64.

    Args:
        wq_old, wq_new: [H, d, D], query projection at the earlier and the later sample.
        wk_old, wk_new: [G, d, D], key projection.

    Raises:
        ValueError: the shapes do not fit together.

    Give all heads, and where possible all windows and layers of equal shape, to one call. On a CUDA
    device nothing waits for it.
    """
    delta2, singles = products(update_grams(wq_old, wk_old, wq_new, wk_new))
    sizes = [len(wq_old), len(wk_old), len(delta2)]
    parts = zip(*(column.split(sizes) for column in measures_of_grams(singles)), strict=True)
    query, key, delta3 = (Measures(*columns) for columns in parts)
    return UpdateMeasures(measures_of_grams(delta2), delta3, query, key)


def delta2_measures(grams: UpdateGrams) -> Measures:
    """The measures [H] of Δ2 alone; may overwrite the Gram matrices."""
    return measures_of_grams(delta2_product(grams))


def recorded(grams: UpdateGrams) -> tuple[Measures, Tensor]:
    """The measures [H] of Δ2, and all singular values of the other matrices.

    Returns:
        The measures, and [2 H + G, d]: squared singular values, descending, of ΔW_q, of ΔW_k and of
        Δ3, one after the other.
    """
    delta2, singles = products(grams)
    return measures_of_grams(delta2), gram_eigenvalues(singles)


def measures_of_grams(matrices: Tensor) -> Measures:
    """Of Gram matrices [n, m, m]; reads the lower triangle and may overwrite it."""
    rows = matrices.shape[-1]
    large = rows >= LEAST_ROWS and rows * matrices.numel() >= LEAST_WORK
    if large and matrices.device.type == "cpu":
        return measures_by_traces(matrices)
    return measures(gram_eigenvalues_ascending(matrices))
