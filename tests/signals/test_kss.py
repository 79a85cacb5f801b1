"""Koopman spectral shaping: the formula, its gradient, and what it does to a map."""

from __future__ import annotations

import pytest
import torch

from mcore_monitors.signals.koopman import decompose, whiten
from mcore_monitors.signals.kss import directions, moments_of, operator_from, shaping_loss


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def literal(operator: torch.Tensor, beta: float, gamma: float, t: float = 20.0) -> torch.Tensor:
    total, near = torch.zeros((), dtype=torch.float64), []
    for value in torch.linalg.eigvals(operator):
        m = value.abs()
        total += torch.sigmoid(t * (m - 1.05)) * torch.log1p(torch.exp(m - 1.05)) ** 2
        near.append(torch.sigmoid(t * (m - 0.90)) * torch.sigmoid(t * (1.05 - m)))
    return total + beta * (torch.stack(near).mean() - gamma) ** 2


def fitted(x: torch.Tensor, y: torch.Tensor, rank: int) -> torch.Tensor:
    along = directions(x.shape[1], rank, torch.Generator().manual_seed(0))
    return operator_from(moments_of(x, y, along), rank)


def test_the_formula() -> None:
    operator = normal(8, 8) / 2.5
    for beta, gamma in ((0.0, 0.3), (1.0, 0.4), (5.0, 0.5)):
        found = shaping_loss(operator, beta=beta, gamma=gamma)
        assert float(found) == pytest.approx(float(literal(operator, beta, gamma)), rel=1e-12)


def test_the_gradient_of_distinct_eigenvalues() -> None:
    """Against differences of the literal formula; damping costs less than a thousandth."""
    operator = normal(6, 6, seed=3) / 2
    operator.requires_grad_()
    shaping_loss(operator, beta=1.0, gamma=0.4).backward()
    step = 1e-6
    for i, j in ((0, 0), (2, 5), (4, 1)):
        moved = operator.detach().clone()
        moved[i, j] += step
        high = literal(moved, 1.0, 0.4)
        moved[i, j] -= 2 * step
        slope = float(high - literal(moved, 1.0, 0.4)) / (2 * step)
        assert float(operator.grad[i, j]) == pytest.approx(slope, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-6])
def test_the_gradient_stays_finite_where_eigenvalues_meet(gap: float) -> None:
    jordan = torch.tensor([[1.2, 1.0], [0.0, 1.2 + gap]], dtype=torch.float64, requires_grad=True)
    shaping_loss(jordan, beta=1.0, gamma=0.4).backward()
    assert jordan.grad.isfinite().all()
    assert float(jordan.grad.abs().max()) < 1e4
    identity = torch.eye(4, dtype=torch.float64, requires_grad=True)
    shaping_loss(identity, beta=1.0, gamma=0.4).backward()
    assert identity.grad.isfinite().all()
    assert float(identity.grad.abs().max()) > 0


def test_the_operator_has_the_profiles_eigenvalues() -> None:
    """With all directions it is the whitened map itself, up to the ridge."""
    x, matrix = normal(300, 10), normal(10, 10, seed=1) / 3
    y = x @ matrix.T + 0.1 * normal(300, 10, seed=2)
    operator = fitted(x, y, 10)
    ours = torch.linalg.eigvals(operator).abs().sort().values
    profiled = decompose(*whiten(x, y)).eigenvalues.abs().sort().values
    assert torch.allclose(ours, profiled, atol=1e-3)


def test_fewer_directions_compress_the_whitened_map() -> None:
    """Against QᵀAQ in whitened coordinates, Q spanning Σ^(1/2) R."""
    x = normal(400, 12) @ normal(12, 12, seed=4) + 3.0
    y = x @ normal(12, 12, seed=1).T / 3 + 0.1 * normal(400, 12, seed=2)
    ours = torch.linalg.eigvals(fitted(x, y, 4)).abs().sort().values
    values, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)) / 400)
    root = vectors * values.sqrt() @ vectors.T
    along = directions(12, 4, torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(root @ along).Q
    white_x, white_y = whiten(x, y, ridge=0.0)
    operator = white_y.T @ white_x / 400
    expected = torch.linalg.eigvals(basis.T @ operator @ basis).abs().sort().values
    assert torch.allclose(ours, expected, rtol=1e-3)


def test_sums_of_parts_are_the_sum_of_all() -> None:
    x, y = normal(6, 50, 8), normal(6, 50, 8, seed=1)
    along = directions(8, 5, torch.Generator().manual_seed(0))
    parts = moments_of(x[:2], y[:2], along) + moments_of(x[2:], y[2:], along)
    assert torch.allclose(parts, moments_of(x, y, along), rtol=1e-6)


def test_descent_brings_modes_inside() -> None:
    x, matrix = normal(300, 10), 1.5 * torch.linalg.qr(normal(10, 10, seed=1)).Q
    matrix.requires_grad_()
    optimizer = torch.optim.SGD([matrix], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        along = directions(10, 10, generator)
        operator = operator_from(moments_of(x, x @ matrix.T, along), 10)
        loss = shaping_loss(operator, beta=0.0, gamma=0.4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(torch.linalg.eigvals(matrix.detach()).abs().max()) < 1.1
