"""Rounding of 16-bit weights: how much it is, and the update spectra without it."""

from __future__ import annotations

import pytest
import torch

from mcore_monitors.signals.rounding import (
    rounding_energy,
    rounding_share,
    spacing,
    without_rounding,
)
from mcore_monitors.signals.spectra import effective_rank
from mcore_monitors.signals.update_grams import UpdateGrams, update_grams
from mcore_monitors.signals.update_spectra import spectra_from_grams

H, d, D = 2, 16, 512


def weights(size: float) -> tuple[torch.Tensor, ...]:
    """W_q, W_k before and after an update of a few directions in noise, fp32."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    old = [0.02 * normal(H, d, D) for _ in range(2)]
    new = [
        w + size * (normal(H, d, 3) @ normal(H, 3, D) / 2 + 0.5 * normal(H, d, D)) for w in old
    ]
    return (*old, *new)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_spacing_is_the_step_to_the_next_number(dtype: torch.dtype, bits: int) -> None:
    values = torch.tensor([1.0, 1.5, 0.02, -0.02, 3.0], dtype=dtype)
    up = (values.view(torch.int16) + 1).view(dtype).float() - values.float()
    assert torch.equal(spacing(values), up.abs())
    assert spacing(values)[0] == 2.0**-bits


@pytest.mark.parametrize("s", [0.02, 0.1, 0.29, 0.31, 0.6, 3.0])
def test_share_is_what_rounding_does(s: float) -> None:
    """400,000 numbers anywhere between two steps, moved by normal changes and rounded."""
    generator = torch.Generator().manual_seed(2)
    start = torch.rand(400_000, generator=generator, dtype=torch.float64)
    change = s * torch.randn(400_000, generator=generator, dtype=torch.float64)
    error = (start + change).round() - start.round() - change
    assert rounding_share(torch.tensor(s)).item() == pytest.approx(
        error.square().mean().item(), rel=0.02
    )


@pytest.mark.parametrize("size", [3e-5, 1e-4, 3e-4])
def test_energy_is_that_of_the_rounding(size: float) -> None:
    exact = weights(size)
    low = [w.bfloat16() for w in exact]
    error = (low[2].float() - low[0].float()) - (exact[2] - exact[0])
    found = rounding_energy(low[0], low[2]).sum()
    assert found.item() == pytest.approx(error.double().square().sum().item(), rel=0.1)


def test_spectra_without_the_rounding_are_nearly_the_true_ones() -> None:
    """A fifth of the energy is rounding: the effective rank of Δ2 is far off, then nearly right."""
    exact = weights(1e-4)
    low = [w.bfloat16() for w in exact]
    energies = rounding_energy(low[0], low[2]), rounding_energy(low[1], low[3])

    def rank(grams: UpdateGrams) -> torch.Tensor:
        return effective_rank(spectra_from_grams(grams).delta2)

    true, plain = rank(update_grams(*exact)), rank(update_grams(*low))
    cleaned = rank(without_rounding(update_grams(*low), *energies))
    assert (plain / true > 1.15).all()
    assert ((cleaned / true - 1).abs() < 0.05).all()


def test_no_change_has_no_rounding() -> None:
    low = [w.bfloat16() for w in weights(1e-4)]
    energy = rounding_energy(low[0], low[0])
    assert energy.abs().max() == 0
    still = update_grams(low[0], low[1], low[0], low[1])
    cleaned = without_rounding(still, energy, rounding_energy(low[1], low[1]))
    assert spectra_from_grams(cleaned).delta2.abs().max() < 1e-12
