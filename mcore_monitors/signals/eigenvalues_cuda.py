"""Kernels that find the eigenvalues of many small symmetric matrices side by side.

Householder reduction to tridiagonal form (Golub and Van Loan, Matrix Computations, 4th ed.,
algorithm 8.3.1), then bisection by Sturm counts (8.4.1): a program a matrix, and a lane an
eigenvalue. Both are backward stable, with errors of a few units in the last place of the matrix's
norm, and neither has a number of steps that depends on the data, so nothing waits for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: halvings of an interval as wide as the spectrum: to its last bit in float64
_HALVINGS = 54
#: eigenvalues a program looks for
_LANES = 64


def eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues [n, m], ascending; arguments as :func:`.eigenvalues.symmetric_eigenvalues`.

    Args:
        matrices: [n, m, m] float64, contiguous, m > 1; overwritten.
    """
    n, m, _ = matrices.shape
    diagonal, beside, reflector, other = matrices.new_empty(4, n, m).unbind()
    values, sizes = matrices.new_empty(n, m), matrices.new_empty(n)
    wide = triton.next_power_of_2(m)
    _tridiagonalise[(n,)](
        matrices, reflector, other, diagonal, beside, sizes, m,
        WIDE=wide, ROWS=16, num_warps=8 if wide > 128 else 4,
    )  # fmt: skip
    _bisect[(n, triton.cdiv(m, _LANES))](
        diagonal, beside, sizes, values, m, _HALVINGS, WIDE=wide, LANES=_LANES, num_warps=2
    )
    return values


@triton.jit
def _tridiagonalise(matrix, reflector, other, diagonal, beside, sizes, m, WIDE: tl.constexpr, ROWS: tl.constexpr):  # noqa: E501
    """One matrix [m, m] over its size to its diagonal [m] and what stands beside it [m − 1]."""
    number = tl.program_id(0).to(tl.int64)
    matrix += number * m * m
    reflector += number * m
    other += number * m
    diagonal += number * m
    beside += number * m
    columns = tl.arange(0, WIDE)
    tile = tl.arange(0, ROWS)
    inside = columns < m

    # Of size one, so that no square of an entry leaves the format's range; and the lower triangle
    # onto the upper one, which may hold anything.
    size = tl.sum(tl.abs(tl.load(matrix + columns * (m + 1), mask=inside, other=0.0)), 0)
    size = tl.where(size > 0, size, 1.0)
    tl.store(sizes + number, size)
    for start in range(0, m, ROWS):
        rows = start + tile
        here = (rows[:, None] < m) & (columns[None, :] <= rows[:, None])
        block = tl.load(matrix + rows[:, None] * m + columns[None, :], mask=here, other=0.0) / size
        tl.store(matrix + rows[:, None] * m + columns[None, :], block, mask=here)
        tl.store(matrix + columns[None, :] * m + rows[:, None], block, mask=here)
    tl.debug_barrier()

    for k in range(0, m - 2):
        # v reflects what stands below the diagonal of column k onto its first entry
        x = tl.load(matrix + k * m + columns, mask=inside & (columns > k), other=0.0)
        first = tl.sum(tl.where(columns == k + 1, x, 0.0), 0)
        norm = tl.sqrt(tl.sum(x * x, 0))
        image = tl.where(first > 0, -norm, norm)
        v = tl.where(columns == k + 1, x - image, x)
        square = tl.sum(v * v, 0)
        beta = tl.where(square > 0, 2.0 / tl.where(square > 0, square, 1.0), 0.0)
        tl.store(reflector + columns, v, mask=inside)
        tl.store(diagonal + k, tl.load(matrix + k * m + k))
        tl.store(beside + k, image)
        tl.debug_barrier()
        # A − v wᵀ − w vᵀ with w = p − (β/2)(pᵀv) v, p = β A v
        p = tl.zeros([WIDE], tl.float64)
        for start in range((k + 1) // ROWS * ROWS, m, ROWS):
            rows = start + tile
            part = tl.load(reflector + rows, mask=rows < m, other=0.0)
            there = (rows[:, None] < m) & (inside & (columns > k))[None, :]
            block = tl.load(matrix + rows[:, None] * m + columns[None, :], mask=there, other=0.0)
            p += tl.sum(block * part[:, None], 0)
        p *= beta
        w = p - 0.5 * beta * tl.sum(p * v, 0) * v
        tl.store(other + columns, w, mask=inside)
        tl.debug_barrier()
        for start in range((k + 1) // ROWS * ROWS, m, ROWS):
            rows = start + tile
            v_rows = tl.load(reflector + rows, mask=rows < m, other=0.0)
            w_rows = tl.load(other + rows, mask=rows < m, other=0.0)
            there = (rows[:, None] < m) & (inside & (columns > k))[None, :]
            entries = matrix + rows[:, None] * m + columns[None, :]
            block = tl.load(entries, mask=there, other=0.0)
            block -= v_rows[:, None] * w[None, :] + w_rows[:, None] * v[None, :]
            tl.store(entries, block, mask=there)
        tl.debug_barrier()

    tl.store(diagonal + m - 2, tl.load(matrix + (m - 2) * m + m - 2))
    tl.store(diagonal + m - 1, tl.load(matrix + (m - 1) * m + m - 1))
    tl.store(beside + m - 2, tl.load(matrix + (m - 1) * m + m - 2))


@triton.jit
def _bisect(diagonal, beside, sizes, values, m, halvings, WIDE: tl.constexpr, LANES: tl.constexpr):
    """Some of the eigenvalues [m] of one tridiagonal matrix."""
    number = tl.program_id(0).to(tl.int64)
    diagonal += number * m
    beside += number * m
    wanted = tl.program_id(1) * LANES + tl.arange(0, LANES)

    # Gershgorin: all eigenvalues lie in here
    columns = tl.arange(0, WIDE)
    inside = columns < m
    middle = tl.load(diagonal + columns, mask=inside, other=0.0)
    left = tl.abs(tl.load(beside + columns - 1, mask=inside & (columns > 0), other=0.0))
    right = tl.abs(tl.load(beside + columns, mask=columns < m - 1, other=0.0))
    lowest = tl.min(tl.where(inside, middle - left - right, float("inf")), 0)
    highest = tl.max(tl.where(inside, middle + left + right, float("-inf")), 0)
    # a pivot of zero is moved by less than round-off
    least = 1e-300 * tl.maximum(1.0, tl.max(right * right, 0))

    low = tl.zeros([LANES], tl.float64) + lowest
    high = tl.zeros([LANES], tl.float64) + highest
    for _ in range(halvings):
        at = 0.5 * (low + high)
        # as many eigenvalues lie below `at` as there are negative pivots of A − at
        pivot = tl.load(diagonal) - at
        pivot = tl.where(tl.abs(pivot) < least, -least, pivot)
        below = (pivot < 0).to(tl.int32)
        for i in range(1, m):
            step = tl.load(beside + i - 1)
            pivot = tl.load(diagonal + i) - at - step * step / pivot
            pivot = tl.where(tl.abs(pivot) < least, -least, pivot)
            below += (pivot < 0).to(tl.int32)
        above = below <= wanted
        low = tl.where(above, at, low)
        high = tl.where(above, high, at)
    found = 0.5 * (low + high) * tl.load(sizes + number)
    tl.store(values + number * m + wanted, found, mask=wanted < m)
