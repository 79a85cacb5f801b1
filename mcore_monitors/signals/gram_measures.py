"""Measures of many small Gram matrices on a CPU, without all of their eigenvalues.

LAPACK brings a symmetric matrix to tridiagonal form quickly; the eigenvalues of that form take it
longer at 64 and 128 rows, by a scalar recurrence of two divisions after each other. Of the four
measures only the largest eigenvalue is one. The norm is a trace, and so is the entropy: with A of
unit trace, H = −tr A ln A, and on [0, 1]

    x ln x = c x + Σ_j w_j ln(1 + x/t_j)      to 2e-13, with 32 shifts t_j from 1e-12 to 16

(shifts that lie the closer the nearer they are to zero, where x ln x is singular, give an error of
exp(−const·√n) with n of them: Trefethen, Nakatsukasa and Weideman, Numer. Math. 147 (2021) 227; the
weights are a least-squares fit). tr ln(1 + A/t) is the logarithm of a determinant, the product of
the pivots q_i = a_i + t − b_i²/q_{i−1} of a tridiagonal A + t: one division a row, of all matrices
and all shifts side by side, and from both ends of the matrix towards its middle.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcore_monitors.signals.spectra import Measures, measures

#: rows of the smallest matrix, and rows³ × matrices of the fewest, for which this is faster, with
#: cold caches too
LEAST_ROWS, LEAST_WORK = 64, 2**23
_SHIFTS, _CLUSTER, _LARGEST_SHIFT = 32, 6.5, 16.0
#: columns that LAPACK reduces together; more are slower at these sizes
_BLOCK = 8
#: pivots of either end whose product is taken before its logarithm; none is below 1e-12
_PRODUCT = 8
#: of the largest eigenvalue, relative
_TOLERANCE = 1e-10


@torch.no_grad()
def measures_by_traces(matrices: Tensor) -> Measures:
    """The four measures of singular values whose squares are the eigenvalues of Gram matrices.

    Args:
        matrices: [n, m, m] float64 on the CPU, m ≥ 2; the lower triangle is read, and the matrices
            may be overwritten.

    Returns:
        Measures [n] float64, as :func:`mcore_monitors.signals.spectra.measures` gives them of the
        eigenvalues: to 1e-10 relative. Zero norm and NaN for a matrix of zeros, NaN for one that is
        not finite.
    """
    traces = matrices.diagonal(dim1=1, dim2=2).sum(1)
    broken = ~traces.isfinite()
    if broken.any():
        matrices.masked_fill_(broken[:, None, None], 0.0)
        traces = traces.masked_fill(broken, torch.nan)
    total = traces.numpy()
    with np.errstate(all="ignore"):  # matrices of zeros: 0/0
        diagonal, beside = _tridiagonal(matrices.contiguous().numpy())
        entropy, positive = _entropy(diagonal / total, np.square(beside / total))
        largest = _largest(diagonal, beside)
        found = np.stack([np.exp(entropy), entropy, np.sqrt(total), total / largest])
        for i in np.flatnonzero(~positive & (total > 0)):
            found[:, i] = _by_eigenvalues(diagonal[:, i], beside[:, i])
    return Measures(*torch.from_numpy(found).unbind())


@lru_cache
def _fit() -> tuple[np.ndarray, np.ndarray, float]:
    """Shifts and weights [_SHIFTS] and c."""
    number = np.sqrt(np.arange(1, _SHIFTS + 1))
    shifts = _LARGEST_SHIFT * np.exp(-_CLUSTER * (number[-1] - number))
    x = np.append(np.logspace(-20, 0, 4000), 0.0)
    wanted = x * np.log(np.where(x > 0, x, 1.0))
    # columns of like size: t ln(1 + x/t) lies between 0 and x
    columns = np.column_stack([shifts * np.log1p(x[:, None] / shifts), x])
    *weights, slope = np.linalg.lstsq(columns, wanted, rcond=1e-15)[0]
    return shifts, np.array(weights) * shifts, float(slope)


@lru_cache
def _lapack() -> Any:
    from scipy.linalg import lapack  # a tenth of a second, and no card needs it

    return lapack


def _tridiagonal(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal [m, n] and, from the second row on, what stands beside it [m, n]."""
    n, m, _ = matrices.shape
    diagonal, beside = np.empty((m, n)), np.zeros((m, n))
    reduce = _lapack().dsytrd
    for i, one in enumerate(matrices):
        # transposed, the lower triangle is the upper one of LAPACK's own layout: no copy
        _, diagonal[:, i], beside[1:, i], _, _ = reduce(
            one.T, lower=0, lwork=_BLOCK * m, overwrite_a=1
        )
    return diagonal, beside


def _entropy(diagonal: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entropy [n], and whether all pivots were positive, of tridiagonal matrices of unit trace."""
    shifts, weights, slope = _fit()
    m, n = diagonal.shape
    half = (m + 1) // 2
    # [row from the end, end, matrix, shift]; of an odd m the lower end has a row of its own to
    # begin with, which stands beside nothing and has the pivot 1 of a matrix of ones
    rows, coupling = np.zeros((half, 2, n)), np.zeros((half, 2, n))
    rows[:, 0], coupling[:, 0] = diagonal[:half], squares[:half]
    lower = m - half
    rows[half - lower :, 1] = diagonal[half:][::-1]
    coupling[half - lower + 1 :, 1] = squares[half + 1 :][::-1]
    pivots = rows[..., None] + shifts
    pivots[: half - lower, 1] = 1.0
    taken = np.repeat(coupling[..., None], len(shifts), axis=-1)
    for i in range(1, half):
        np.divide(taken[i], pivots[i - 1], out=taken[i])
        np.subtract(pivots[i], taken[i], out=pivots[i])
    # where the two ends meet
    middle = 1 - squares[half][:, None] / (pivots[-1, 0] * pivots[-1, 1])
    positive = (pivots.min(axis=(0, 1)) > 0).all(-1) & (middle > 0).all(-1)
    products = np.multiply.reduceat(pivots, range(0, half, _PRODUCT), axis=0).prod(1)
    logarithms = np.log(products).sum(0) + np.log(middle) - m * np.log(shifts)
    return -(logarithms @ weights + slope), positive


def _largest(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """Largest eigenvalue [n], by bisection."""
    m, n = diagonal.shape
    found, bisect = np.empty(n), _lapack().dstebz
    columns = zip(diagonal.T.copy(), beside[1:].T.copy(), strict=True)
    for i, (d, e) in enumerate(columns):
        # 2, m, m: eigenvalues number m to m, in ascending order
        _, values, *_ = bisect(d, e, 2, 0.0, 0.0, m, m, _TOLERANCE * d.max(), b"E")
        found[i] = values[0]
    return found


def _by_eigenvalues(diagonal: np.ndarray, beside: np.ndarray) -> Measures:
    """The same of one matrix that round-off has made indefinite: negative ones count as zero."""
    values, _ = _lapack().dsterf(diagonal, beside[1:])
    return measures(torch.from_numpy(values).clamp_(min=0))
