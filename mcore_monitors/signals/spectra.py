"""Measures of a spectrum: how many directions a matrix has, and how strong they are.

All take *squared* singular values, in which every route here computes them: the eigenvalues of a
Gram matrix are squared singular values, and the entropy is defined on them (arXiv 2606.28116).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_Numbers = Tensor | np.ndarray


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
    values, xp = singular_values_squared, torch
    if values.device.type == "cpu":  # a few numbers: NumPy takes a third of the time
        values, xp = values.numpy(), np
    with np.errstate(all="ignore"):
        total = values.sum(-1)
        entropy = _entropy(values, total)
        found = Measures(
            effective_rank=xp.exp(entropy),
            spectral_entropy=entropy,
            frobenius=xp.sqrt(total + (total - total)),  # inf − inf is NaN
            stable_rank=total / xp.amax(values, -1),
        )
    return found if xp is torch else Measures(*map(torch.as_tensor, found))


def spectral_entropy(singular_values_squared: Tensor) -> Tensor:
    """Entropy of the normalised squared singular values, H = −Σ p ln p with p_i = s_i²/Σs².

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...], nats, from 0 to ln n; NaN where all values are zero or one is not finite.
    """
    return _entropy(singular_values_squared, singular_values_squared.sum(-1))


def _entropy(values: _Numbers, total: _Numbers) -> _Numbers:
    shares = values / total[..., None]
    if isinstance(shares, Tensor):
        return torch.special.entr(shares).sum(-1)
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)


def effective_rank(singular_values_squared: Tensor) -> Tensor:
    """Effective rank exp(H) of a spectrum, from 1 (one direction) to n (all alike).

    Args:
        singular_values_squared: [..., n], not negative.

    Returns:
        [...]; NaN where :func:`spectral_entropy` is NaN.
    """
    return spectral_entropy(singular_values_squared).exp()
