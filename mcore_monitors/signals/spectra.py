"""Measures of a spectrum: how many directions a matrix has, and how strong they are.

All take *squared* singular values, in which every route here computes them: the eigenvalues of a
Gram matrix are squared singular values, and the entropy is defined on them (arXiv 2606.28116).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    total = singular_values_squared.sum(-1)
    entropy = _entropy(singular_values_squared, total)
    return Measures(
        effective_rank=entropy.exp(),
        spectral_entropy=entropy,
        frobenius=(total + (total - total)).sqrt(),  # inf − inf is NaN
        stable_rank=total / singular_values_squared.amax(-1),
    )


def spectral_entropy(singular_values_squared: Tensor) -> Tensor:
    """Entropy of the normalised squared singular values, H = −Σ p ln p with p_i = s_i²/Σs².

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...], nats, from 0 to ln n; NaN where all values are zero or one is not finite.
    """
    return _entropy(singular_values_squared, singular_values_squared.sum(-1))


def _entropy(singular_values_squared: Tensor, total: Tensor) -> Tensor:
    return torch.special.entr(singular_values_squared / total.unsqueeze(-1)).sum(-1)


def effective_rank(singular_values_squared: Tensor) -> Tensor:
    """Effective rank exp(H) of a spectrum, from 1 (one direction) to n (all alike).

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...]; NaN where :func:`spectral_entropy` is NaN.
    """
    return spectral_entropy(singular_values_squared).exp()
