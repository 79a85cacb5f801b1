"""Measures without eigenvalues equal those of the eigenvalues."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mcore_monitors.signals import gram_measures
from mcore_monitors.signals.gram_measures import measures_by_traces
from mcore_monitors.signals.spectra import measures


def of_eigenvalues(matrices: torch.Tensor) -> torch.Tensor:
    return torch.stack(measures(torch.linalg.eigvalsh(matrices).clamp(min=0)))


def draw(kind: str, rows: int, n: int = 3) -> torch.Tensor:
    """Factors [n, rows, columns] of Gram matrices."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(n, rows, 2 * rows, generator=g, dtype=torch.float64)
    if kind == "decaying":
        x *= torch.logspace(0, -8, rows, dtype=torch.float64)[:, None]
    elif kind == "rank one":
        x = x[:, :, :1] @ x[:, :1]
    elif kind == "one direction and noise":
        x = x[:, :, :1] @ x[:, :1] + 1e-4 * x
    elif kind == "equal":
        x = torch.eye(rows, dtype=torch.float64).expand(n, rows, rows)
    return x


@pytest.mark.parametrize("rows", [2, 3, 16, 33, 64, 65, 128])
@pytest.mark.parametrize(
    "kind", ["white", "decaying", "rank one", "one direction and noise", "equal"]
)
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_equals_eigenvalues(kind: str, rows: int, size: float) -> None:
    x = draw(kind, rows) * size
    gram = x @ x.mT
    expected = of_eigenvalues(gram)
    found = torch.stack(measures_by_traces(gram.clone()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_entropy_of_a_number_is_fitted_to_round_off() -> None:
    x = np.concatenate([[0.0], np.logspace(-18, 0, 20_011)])
    shifts, weights, slope = gram_measures._fit()
    fitted = np.log1p(x[:, None] / shifts) @ weights + slope * x
    wanted = np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0)), 0.0)
    assert np.abs(fitted - wanted).max() < 5e-13


def test_reads_the_lower_triangle() -> None:
    x = draw("white", 64)
    gram = x @ x.mT
    expected = of_eigenvalues(gram)
    found = torch.stack(measures_by_traces(gram.tril() + 1e3 * torch.ones(64, 64).triu(1)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_zeros_and_what_is_not_finite() -> None:
    x = draw("white", 64, n=4)
    gram = x @ x.mT
    whole = of_eigenvalues(gram)
    gram[1], gram[2, 5, 5], gram[3, 7, 7] = 0.0, math.nan, math.inf
    found = torch.stack(measures_by_traces(gram))
    torch.testing.assert_close(found[:, 0], whole[:, 0], rtol=1e-9, atol=0)
    assert found[2, 1] == 0 and found[[0, 1, 3], 1].isnan().all()
    assert found[:, 2:].isnan().all()


def test_round_off_below_zero() -> None:
    """What float32 Gram matrices leave: an eigenvalue that is negative counts as none."""
    x = draw("decaying", 64)
    values, vectors = torch.linalg.eigh(x @ x.mT)
    values[:, :3] = -1e-8 * values[:, -1:]
    gram = vectors @ (values[:, :, None] * vectors.mT)
    found = torch.stack(measures_by_traces(gram.clone()))
    torch.testing.assert_close(found, of_eigenvalues(gram), rtol=1e-9, atol=0)
