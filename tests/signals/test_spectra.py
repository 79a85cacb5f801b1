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


def test_rows_are_measured_as_any_other_shape_is():
    """Plain float64 rows on a CPU have a way of their own: zeros, and shares of many sizes."""
    squared = torch.rand(20, 64, generator=torch.Generator().manual_seed(0)).double() ** 200
    squared[3, 10:] = 0.0
    squared[5] *= 1e-200
    assert squared[0].sum() > 1e15 * squared[0].min()
    for rows, any_shape in zip(measures(squared), measures(squared[None]), strict=True):
        torch.testing.assert_close(rows, any_shape[0], rtol=1e-13, atol=1e-15)


def test_one_broken_row_changes_no_other():
    squared = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)).double()
    right = measures(squared)
    squared[1], squared[2, 3] = 0.0, torch.nan
    for got, wanted in zip(measures(squared), right, strict=True):
        torch.testing.assert_close(got[[0, 3]], wanted[[0, 3]])
        assert got[2].isnan()
