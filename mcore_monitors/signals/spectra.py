"""Measures of a spectrum: how many directions a matrix has, and how strong they are.

All take *squared* singular values, in which every route here computes them: the eigenvalues of a
Gram matrix are squared singular values, and the entropy is defined on them (arXiv 2606.28116).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: makes 0 ln 0 a zero, and changes no share that counts
_TINY = 1e-300


class Measures(NamedTuple):
    """Four measures of one spectrum each, shaped like the spectra without their last dimension."""

    effective_rank: Tensor
    """exp(H), directions, from 1 to the number of singular values."""
    spectral_entropy: Tensor
    """H = −Σ p ln p with p = s²/Σs², nats."""
    frobenius: Tensor
    """‖M‖_F = √Σs², in the unit of the matrix."""
    stable_rank: Tensor
    """‖M‖_F²/‖M‖₂², directions, from 1 to the number of singular values."""


def measures(singular_values_squared: Tensor) -> Measures:
    """All four measures of each spectrum.

    Args:
        singular_values_squared: [..., n], not negative, in any order.

    Returns:
        Measures of shape [...]. Where all values are zero the norm is 0 and the others are NaN;
        where one is not finite nothing is.
    """
    values = singular_values_squared
    if values.device.type == "cpu" and values.dim() == 2 and values.dtype == torch.float64:
        rows = _of_rows(values.numpy())
        if rows is not None:
            return Measures(*torch.tensor(rows, dtype=values.dtype).unbind(1))
    total = values.sum(-1)
    entropy = _entropy(values, total)
    return Measures(
        effective_rank=entropy.exp(),
        spectral_entropy=entropy,
        frobenius=(total + (total - total)).sqrt(),  # inf − inf is NaN
        stable_rank=total / values.amax(-1),
    )


def _of_rows(values: np.ndarray) -> list[tuple[float, ...]] | None:
    """The measures of each row [n, m]; None where one has no positive finite sum.

    A few numbers, with cold caches: every operation that is not made, NumPy's or PyTorch's, saves
    ten to thirty microseconds.
    """
    total = np.add.reduce(values, -1)
    totals = total.tolist()
    if not all(0 < t < math.inf for t in totals):
        return None
    shares = values / total[:, None]
    logarithms = np.log(shares + _TINY)
    logarithms *= shares
    sums = np.add.reduce(logarithms, -1).tolist()
    largest = np.maximum.reduce(values, -1).tolist()
    return [
        (math.exp(-p_ln_p), -p_ln_p, math.sqrt(t), t / most)
        for p_ln_p, t, most in zip(sums, totals, largest, strict=True)
    ]


def spectral_entropy(singular_values_squared: Tensor) -> Tensor:
    """Entropy of the normalised squared singular values, H = −Σ p ln p with p_i = s_i²/Σs².

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...], nats, from 0 to ln n; NaN where all values are zero or one is not finite.
    """
    return _entropy(singular_values_squared, singular_values_squared.sum(-1))


def _entropy(values: Tensor, total: Tensor) -> Tensor:
    return torch.special.entr(values / total[..., None]).sum(-1)


def effective_rank(singular_values_squared: Tensor) -> Tensor:
    """Effective rank exp(H) of a spectrum, from 1 (one direction) to n (all alike).

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...]; NaN where :func:`spectral_entropy` is NaN.
    """
    return spectral_entropy(singular_values_squared).exp()
