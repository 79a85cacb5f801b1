"""Geometry of the router's rows against loops over experts."""

import itertools

import pytest
import torch

from mcore_monitors.signals.router import (
    centred_conditioning,
    row_norm_spread,
    weight_similarity,
)

E, D = 8, 24


def router(seed=0, common=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(E, D, generator=g) + common


@pytest.mark.parametrize("common", [0.0, 1.0, 30.0])
def test_similarity_is_the_mean_pairwise_cosine(common):
    w = router(common=common).double()
    cosines = [
        torch.dot(w[i], w[j]) / (w[i].norm() * w[j].norm())
        for i, j in itertools.permutations(range(E), 2)
    ]
    want = torch.stack(cosines).mean()
    torch.testing.assert_close(weight_similarity(w), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(weight_similarity(w.float()), want, rtol=0, atol=1e-7)


def test_similarity_at_its_ends():
    same = torch.ones(E, D) * torch.arange(1, E + 1)[:, None]  # one direction, any lengths
    assert weight_similarity(same).item() == pytest.approx(1, abs=1e-12)
    assert weight_similarity(torch.eye(E)).item() == pytest.approx(0, abs=1e-12)
    simplex = torch.eye(E) - 1 / E
    assert weight_similarity(simplex).item() == pytest.approx(-1 / (E - 1), abs=1e-7)


def test_similarity_ignores_row_lengths_and_rotations():
    w = router(common=0.3).double()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    lengths = torch.rand(E, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(weight_similarity(lengths * w @ rotation), weight_similarity(w))


def test_where_similarity_has_no_meaning():
    assert weight_similarity(torch.ones(1, D)).isnan()
    w = router()
    w[3] = 0
    assert weight_similarity(w).isnan()
    w[3] = float("inf")
    assert weight_similarity(w).isnan()


@pytest.mark.parametrize("common", [0.1, 1.0, 30.0])
def test_conditioning_by_hand(common):
    w = router(common=common).double()
    mean = sum(w) / E
    want = max((row - mean).norm() for row in w) / mean.norm()
    torch.testing.assert_close(centred_conditioning(w), want)
    torch.testing.assert_close(centred_conditioning(7 * w), want)


def test_stacked_layers_at_once():
    stack = torch.stack([router(0), router(1, common=2.0)])
    for function in (weight_similarity, centred_conditioning, row_norm_spread):
        torch.testing.assert_close(function(stack), torch.stack([function(w) for w in stack]))


def test_row_norm_spread_by_hand():
    w = router(common=1.0).double()
    norms = [sum(x * x for x in row.tolist()) ** 0.5 for row in w]
    mean = sum(norms) / E
    want = (sum((n - mean) ** 2 for n in norms) / E) ** 0.5 / mean
    assert row_norm_spread(w).item() == pytest.approx(want, rel=1e-12)
    assert row_norm_spread(7 * w).item() == pytest.approx(want, rel=1e-12)


def test_row_norm_spread_at_its_ends():
    assert row_norm_spread(torch.eye(E)).item() == 0
    one = torch.zeros(E, D)
    one[3] = 5.0
    assert row_norm_spread(one).item() == pytest.approx((E - 1) ** 0.5, rel=1e-12)
    assert row_norm_spread(torch.zeros(E, D)).isnan()
