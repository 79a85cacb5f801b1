"""Measures of known spectra."""

import math

import pytest
import torch

from mcore_monitors.signals.spectra import effective_rank, measures, spectral_entropy


def test_measures_of_known_spectra():
    squared = torch.tensor([[4.0, 4, 4, 4], [9, 0, 0, 0], [2, 1, 1, 0]], dtype=torch.float64)
    got = measures(squared)
    half = 1.5 * math.log(2)
    assert got.spectral_entropy.tolist() == pytest.approx([math.log(4), 0, half])
    assert got.effective_rank.tolist() == pytest.approx([4, 1, math.exp(half)])
    assert got.frobenius.tolist() == pytest.approx([4, 3, 2])
    assert got.stable_rank.tolist() == pytest.approx([4, 1, 2])
    assert torch.equal(got.effective_rank, effective_rank(squared))
    assert torch.equal(got.spectral_entropy, spectral_entropy(squared))


def test_order_does_not_matter_and_leading_dimensions_stay():
    squared = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)).double()
    for one, other in zip(measures(squared), measures(squared.flip(-1)), strict=True):
        assert one.shape == (2, 3)
        torch.testing.assert_close(one, other)


def test_a_matrix_of_zeros_has_a_norm_and_no_directions():
    got = measures(torch.zeros(1, 4))
    assert got.frobenius.tolist() == [0]
    for value in (got.effective_rank, got.spectral_entropy, got.stable_rank):
        assert value.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_spectrum_that_is_not_finite_has_no_measures(bad):
    for value in measures(torch.tensor([[bad, 1.0], [bad, bad]])):
        assert value.isnan().all()
