"""Spikes against the noise bulk on planted and on healthy draws, and their persistence."""

import math

import pytest
import torch

from mcore_monitors.signals.direction import direction_overlap, leading_directions
from mcore_monitors.signals.spike import _marchenko_pastur_median, persistent_spike, spike
from mcore_monitors.signals.update_grams import update_grams
from mcore_monitors.signals.update_spectra import spectra_from_grams


def noise(draws, d, D, seed):
    return torch.randn(draws, d, D, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed):
    return torch.nn.functional.normalize(noise(*shape, seed=seed), dim=-1)


def squared(x):
    return torch.linalg.eigvalsh((x @ x.mT).double()).flip(-1)


@pytest.mark.parametrize("d, D", [(16, 64), (32, 128), (64, 512), (64, 40)])
def test_a_thousand_healthy_draws(d, D):
    """Under 1% false positives; the level was fixed from theory, not from these draws."""
    found = spike(squared(3e-5 * noise(1000, d, D, seed=20)), D)
    assert (found.outliers > 0).sum() < 10
    assert (found.strength > 0).equal(found.outliers > 0)


@pytest.mark.parametrize("d, D", [(16, 64), (32, 128), (64, 512), (64, 40)])
@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_a_planted_coherent_part_is_found_and_sized(d, D, strength):
    x = noise(200, d, D, seed=21)
    left, right = unit(200, 1, d, seed=22).mT, unit(200, 1, D, seed=23)
    found = spike(squared(1e-5 * (x + strength * math.sqrt(d * D) * left @ right)), D)
    assert (found.outliers >= 1).all()
    assert found.strength.mean().item() == pytest.approx(strength, rel=0.05)
    assert found.outliers.mean() < 1.05


def test_several_directions_are_counted():
    x = noise(50, 64, 512, seed=24)
    left = torch.linalg.qr(noise(50, 64, 3, seed=25)).Q
    right = torch.linalg.qr(noise(50, 512, 3, seed=26)).Q.mT
    found = spike(squared(x + 0.5 * math.sqrt(64 * 512) * left @ right), 512)
    assert found.outliers.mean().item() == pytest.approx(3, abs=0.05)


def test_scale_is_without_meaning():
    x = squared(noise(20, 16, 64, seed=27))
    for one, other in zip(spike(x, 64), spike(1e-18 * x, 64), strict=True):
        torch.testing.assert_close(one, other)


def test_no_update_and_non_finite_are_unknown():
    x = squared(noise(3, 16, 64, seed=28))
    x[0], x[1, 0] = 0, math.nan
    for value in spike(x, 64):
        assert value.isnan().tolist() == [True, True, False]


def test_an_update_without_a_bulk_is_all_coherent():
    low = noise(4, 16, 2, seed=29) @ noise(4, 2, 64, seed=30)
    low = torch.linalg.svdvals(low.double()).square()
    low[:, 2:] = 0
    found = spike(low, 64)
    assert found.outliers.tolist() == [2] * 4
    assert found.strength.isinf().all()


@pytest.mark.parametrize("ratio", [1 / 16, 1 / 4, 1.0])
def test_median_of_the_noise_law(ratio):
    n = 400
    m = round(n / ratio)
    values = squared(noise(1, n, m, seed=31)) / m
    assert _marchenko_pastur_median(ratio) == pytest.approx(values.median().item(), rel=0.02)


H, G, d, D, SAMPLES = 8, 4, 16, 128, 5


def monitored(updates):
    """Persistent spikes [H] of a training whose samples moved by updates [(ΔW_q, ΔW_k), …]."""
    wq, wk = 0.02 * noise(H, d, D, seed=1), 0.02 * noise(G, d, D, seed=2)
    outliers, directions = [], []
    for dq, dk in updates:
        moved = wq + 1e-4 * dq, wk + 1e-4 * dk
        grams = update_grams(wq, wk, *moved)
        outliers.append(spike(spectra_from_grams(grams).query, D).outliers)
        directions.append(leading_directions(grams, wq, wk, *moved))
        wq, wk = moved
    outliers, directions = torch.stack(outliers), torch.stack(directions)
    return outliers, persistent_spike(outliers, direction_overlap(directions[1:], directions[:-1]))


def low_rank(heads, rank, seed):
    return noise(heads, d, rank, seed=seed) @ noise(heads, rank, D, seed=seed + 1) / rank**0.5


@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_updates_without_a_lasting_direction_are_no_fault(rank):
    """LoRA-like: each sample's update is nearly all low-rank, in directions of its own."""
    for trial in range(10):
        seeds = [1000 * trial + 10 * s for s in range(SAMPLES)]
        outliers, found = monitored(
            [
                (
                    low_rank(H, rank, s) + 0.1 * noise(H, d, D, s + 4),
                    low_rank(G, rank, s + 2) + 0.1 * noise(G, d, D, s + 5),
                )
                for s in seeds
            ]
        )
        assert (outliers >= 1).all(), "outlying all the same"
        assert not found.any()


def test_noise_alone_is_no_fault():
    updates = [(noise(H, d, D, 50 + s), noise(G, d, D, 60 + s)) for s in range(SAMPLES)]
    assert not monitored(updates)[1].any()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_push_that_stays_is_found(strength):
    """A biased fault in three of the heads, the same direction at every sample."""
    push = strength * math.sqrt(d * D) * unit(H, 1, d, seed=3).mT @ unit(H, 1, D, seed=4)
    push[3:] = 0
    updates = [(push + noise(H, d, D, 70 + s), noise(G, d, D, 80 + s)) for s in range(SAMPLES)]
    assert monitored(updates)[1].tolist() == [True] * 3 + [False] * 5


def test_persistence_needs_every_sample():
    outliers, overlaps = torch.ones(3, 4), torch.full((2, 4), 0.9)
    outliers[1, 1] = 0
    overlaps[0, 2] = 0.3
    overlaps[1, 3] = math.nan
    assert persistent_spike(outliers, overlaps).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="S − 1"):
        persistent_spike(outliers, outliers)
    with pytest.raises(ValueError, match="S ≥ 2"):
        persistent_spike(outliers[:1], overlaps[:0])
