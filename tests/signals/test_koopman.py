"""The Koopman profile against closed forms: maps whose eigenvalues are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mcore_monitors.signals.koopman import (
    decompose,
    features,
    kreiss_constant,
    profile,
    whiten,
)

TOKENS, WIDTH = 400, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sorted_by(values: Tensor) -> Tensor:
    order = torch.tensor(sorted(values.tolist(), key=lambda z: (round(z.real, 6), z.imag)))
    return order.to(torch.complex128)


def map_with(moduli: list[float], angles: list[float], seed: int) -> tuple[Tensor, Tensor]:
    """A real matrix with the eigenvalue pairs m·e^(±ia), in a random basis, and its eigenvalues."""
    blocks, values = [], []
    for m, a in zip(moduli, angles, strict=True):
        c, s = m * math.cos(a), m * math.sin(a)
        blocks.append(torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
        values += [complex(c, s), complex(c, -s)]
    basis = normal(2 * len(moduli), 2 * len(moduli), seed=seed)
    return basis @ torch.block_diag(*blocks) @ basis.inverse(), torch.tensor(values)


def test_a_linear_map_gives_its_eigenvalues_back_in_any_basis() -> None:
    moduli = [1.0, 0.97, 0.5, 1.3, 0.85, 1.02]
    angles = [0.1, 0.9, 2.0, 0.4, 3.0, 1.5]
    for seed in range(3):  # a change of basis is another random basis of the same map
        matrix, expected = map_with(moduli, angles, seed)
        x = normal(TOKENS, WIDTH, seed=9)
        modes = decompose(*whiten(x, x @ matrix.T))
        assert torch.allclose(
            sorted_by(modes.eigenvalues), sorted_by(expected), atol=1e-4, rtol=0
        )
        assert float(modes.residuals.max()) < 1e-6
        assert float(modes.nonlinearity) < 1e-6
        found = features(modes)
        assert float(found.near_unit) == pytest.approx(6 / 12)
        assert float(found.super_unit) == pytest.approx(2 / 12)
        assert float(found.sub_unit) == pytest.approx(2 / 12)
        assert float(found.spectral_radius) == pytest.approx(1.3, abs=1e-4)


def test_an_offset_and_the_scale_of_the_stream_do_not_count() -> None:
    matrix, _ = map_with([1.0, 0.6], [0.3, 1.0], 1)
    x = normal(TOKENS, 4, seed=2)
    plain = profile(x, x @ matrix.T)
    moved = profile(50 * x + 7, 50 * x @ matrix.T - 3)
    for a, b in zip(plain, moved, strict=True):
        assert torch.allclose(a, b, rtol=1e-3)


@pytest.mark.parametrize(
    ("radius", "near", "over", "under"),
    [(1.0, 1, 0, 0), (0.95, 1, 0, 0), (1.2, 0, 1, 0), (0.7, 0, 0, 1), (0.85, 0, 0, 0)],
)
def test_a_scaled_rotation(radius: float, near: float, over: float, under: float) -> None:
    rotation = torch.linalg.qr(normal(WIDTH, WIDTH, seed=3)).Q
    x = normal(TOKENS, WIDTH)
    found = profile(x, radius * x @ rotation.T)
    assert [float(f) for f in found[:3]] == [near, over, under]
    assert float(found.spectral_radius) == pytest.approx(radius, abs=1e-4)
    assert float(found.kreiss) < 1.2


def test_identity_passes_everything_and_adds_nothing() -> None:
    x = normal(TOKENS, WIDTH)
    found = profile(x, x)
    assert float(found.near_unit) == 1.0
    assert float(found.condition) < 1e3
    assert math.isnan(float(found.nonlinearity))  # of an addition of nothing there is no share


def test_a_random_map_obeys_the_circular_law() -> None:
    """Gaussian entries of variance 1/D: eigenvalues fill the unit disc evenly."""
    width = 200
    x = normal(4 * width, width)
    found = profile(x, x @ (normal(width, width, seed=5) / width**0.5).T)
    # shares of the disc's area: |λ| < 0.8 → 0.64; 0.9 to 1 → 0.19, some of it just outside
    assert float(found.sub_unit) == pytest.approx(0.64, abs=0.05)
    assert float(found.near_unit) == pytest.approx(0.19, abs=0.05)


def test_randomized_against_full() -> None:
    """Identity plus a map of rank two: two modes move, the others stay at one."""
    width, rank = 40, 10
    low_rank = normal(width, 2, seed=1) @ normal(2, width, seed=2) / width
    x = normal(10 * width, width)
    y = x + x @ low_rank.T
    full, some = profile(x, y), profile(x, y, rank=rank)
    assert float(full.near_unit) >= 1 - 2 / width
    assert float(some.near_unit) >= 1 - 2 / rank
    every = profile(x, y, rank=width)
    for a, b in zip(full, every, strict=True):
        assert torch.equal(a, b)
    again = profile(x, y, rank=rank)
    assert torch.equal(some.near_unit, again.near_unit)


def test_a_batch_is_its_layers_one_by_one() -> None:
    x, y = normal(3, 100, 8), normal(3, 100, 8, seed=1)
    together = profile(x, y)
    for layer in range(3):
        alone = profile(x[layer], y[layer])
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[layer], b, rtol=1e-6)


def test_a_layer_that_is_not_finite_leaves_the_others_alone() -> None:
    x, y = normal(3, 100, 8), normal(3, 100, 8, seed=1)
    good = profile(x, y)
    y[1, 5, 2] = math.inf
    found = profile(x, y)
    for a, b in zip(found, good, strict=True):
        assert math.isnan(float(a[1]))
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_fewer_tokens_than_channels() -> None:
    """Directions that no token has move nowhere: zero modes, and nothing is infinite."""
    x = normal(20, 50)
    found = profile(x, 1.0 * x)
    # 19 directions are seen once the mean is taken out
    assert float(found.near_unit) == pytest.approx(19 / 50)
    assert float(found.sub_unit) == pytest.approx(31 / 50)
    assert float(profile(x, x, rank=10).near_unit) == 1.0


def test_a_defective_map_has_no_basis() -> None:
    jordan = torch.eye(6, dtype=torch.float64) + torch.diag(torch.ones(5, dtype=torch.float64), 1)
    x = normal(TOKENS, 6)
    found = profile(x, x @ jordan.T)
    assert float(found.condition) > 1e6
    assert float(found.spectral_radius) == pytest.approx(1.0, abs=0.05)
    assert all(math.isfinite(float(f)) for f in found if not math.isnan(float(f)))


def test_the_filter_drops_what_is_not_linear() -> None:
    x = normal(TOKENS, WIDTH)
    modes = decompose(*whiten(x, torch.cat([x[:, :6], normal(TOKENS, 6, seed=4)], -1)))
    assert (modes.residuals < 1e-6).sum() == 6
    assert float(features(modes, most_residual=0.1).near_unit) == 1.0
    noise = decompose(*whiten(x, normal(TOKENS, WIDTH, seed=4)))
    assert math.isnan(float(features(noise, most_residual=0.1).near_unit))


def test_kreiss_constant_of_a_growing_map() -> None:
    """[[0, m], [0, 0]]: ‖A‖ = m, sup (|z| − 1)‖(zI − A)⁻¹‖ lies between m/4 and m."""
    m = 20.0
    found = float(kreiss_constant(torch.tensor([[0.0, m], [0.0, 0.0]], dtype=torch.float64)))
    assert m / 5 < found <= m
    normal_map = torch.diag(torch.tensor([0.9, 0.5], dtype=torch.float64))
    assert float(kreiss_constant(normal_map)) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_that_cannot_be(rank: int) -> None:
    x = normal(10, 8)
    with pytest.raises(ValueError, match=f"rank: {rank}"):
        decompose(x, x, rank=rank)
    with pytest.raises(ValueError, match="one shape"):
        decompose(x, x[:5])
