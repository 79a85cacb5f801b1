"""Direction over samples: rounding cancels, a bias stays, and the false-alarm level is honest."""

from __future__ import annotations

import math

import pytest
import torch

from mcore_monitors.signals import conservation as c


def sums(vectors, scale=None):
    """[n, G, d] as n sequences."""
    return c.direction_terms(vectors, torch.ones(vectors.shape[:2]) if scale is None else scale)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sums_by_loop():
    vectors, scale = normal(5, 2, 3), normal(5, 2, seed=1).abs()
    scale[2, 1] = 0
    got = sums(vectors, scale)
    for g in range(2):
        kept = [vectors[i, g] / scale[i, g] for i in range(5) if scale[i, g] != 0]
        torch.testing.assert_close(got[g, :3], sum(kept))
        torch.testing.assert_close(got[g, 3], sum(r.norm() for r in kept))
        torch.testing.assert_close(got[g, 4], sum(r.norm() ** 2 for r in kept))
        assert got[g, 5] == len(kept)


def test_a_number_is_a_vector_of_one():
    numbers, scale = normal(6, 4), torch.full((6, 4), 2.0)
    torch.testing.assert_close(sums(numbers, scale), sums(numbers.unsqueeze(-1), scale))


def test_sums_add_up_over_micro_batches():
    vectors = normal(12, 2, 3)
    torch.testing.assert_close(
        sum(sums(part) for part in vectors.split(5)), sums(vectors), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("d", [1, 2, 32])
def test_coherence_of_rounding_is_one_over_root_n_and_of_a_bias_one(d):
    n = 400
    noise = normal(n, 50, d)
    noise = noise / noise.norm(dim=-1, keepdim=True)
    got = c.direction_coherence(sums(noise))
    assert got.square().mean().sqrt().item() == pytest.approx(n**-0.5, rel=0.2)
    bias = torch.ones(n, 1, d)
    assert c.direction_coherence(sums(bias)).item() == pytest.approx(1)
    assert c.direction_bias(sums(bias)).item() == pytest.approx(d**0.5)
    assert c.direction_log_p(sums(bias)).item() == pytest.approx(math.log(2) - n / 2)


@pytest.mark.parametrize("d", [1, 8])
@pytest.mark.parametrize("spread", ["alike", "heavy tails", "one direction"])
def test_the_level_is_kept_whatever_the_noise(d, spread):
    """4,000 healthy windows of 30: p ≤ x in at most a share x, for one head and for four."""
    noise = normal(30, 4000, d)
    if spread == "heavy tails":
        noise = noise * normal(30, 4000, 1, seed=1).abs() ** 3
    elif spread == "one direction":
        noise = noise[..., :1] * torch.ones(d)
    got = sums(noise)
    for level in (0.2, 0.05, 0.01):
        assert (c.direction_log_p(got).exp() <= level).double().mean() <= level
        heads = c.direction_layer_log_p(got.unflatten(0, (1000, 4)))
        assert heads.shape == (1000,)
        assert (heads.exp() <= level).double().mean() <= level


def test_a_small_bias_in_all_heads_is_seen_together_before_any_alone():
    vectors = normal(100, 8, 1) + 0.35
    got = sums(vectors)
    together = c.direction_layer_log_p(got).item()
    alone = c.direction_log_p(got).min().item() + math.log(8)
    assert together < alone - 10
    one = normal(100, 8, 1)
    one[:, 3] += 3  # and a bias in a single one is not lost among the others
    assert c.direction_layer_log_p(sums(one)).item() < math.log(1e-12)


def test_no_sequence_is_no_evidence():
    empty = torch.zeros(3, 4)
    assert c.direction_log_p(empty).isnan().all()


@pytest.mark.parametrize("d", [1, 8])
def test_numbers_on_the_host_are_those_of_tensors(d):
    got = sums(normal(30, 40, d) + 0.2).double()
    for measure in (
        c.direction_coherence,
        c.direction_bias,
        c.direction_energy,
        c.direction_log_p,
        lambda x: c.direction_layer_log_p(x.reshape(10, 4, -1)),
        lambda x: c.spread_log_p(x[:, -2], x[:, -1], 0.5),
    ):
        torch.testing.assert_close(torch.from_numpy(measure(got.numpy())), measure(got))


def test_the_bound_for_a_layer_by_its_three_parts():
    got = sums(normal(30, 12, 1) + 0.3).double().unflatten(0, (3, 4))
    energy = c.direction_energy(got)
    for heads, of_heads, found in zip(got, energy, c.direction_layer_log_p(got), strict=True):
        total = max(of_heads.sum().item(), 4)
        bounds = (
            -total / 2 + 2 * (1 + math.log(total / 4)),
            c.direction_log_p(heads).min().item() + math.log(4),
            c.direction_log_p(heads.sum(0)).item(),
        )
        assert found.item() == pytest.approx(min(0.0, min(bounds) + math.log(3)))


def test_window_forgets_and_looks_back():
    window = c.SampleWindow(2, 4, (3, 1, 2))
    samples = [sums(normal(4, 2, 1, seed=i)).double() for i in range(5)]
    for i, sample in enumerate(samples):
        window.add(sample.numpy())
        kept = samples[max(0, i - 2) : i + 1]
        wanted = torch.stack([sum(kept), sample, sum(kept[-2:])])
        torch.testing.assert_close(torch.from_numpy(window.sums()), wanted)
    window.clear()
    assert not window.sums().any()


@pytest.mark.parametrize("rounding", ["normal", "even"])
def test_the_level_of_a_spread_is_kept(rounding):
    """4,000 healthy windows of 12 residuals that leave exactly what they may."""
    r = normal(12, 4000)
    if rounding == "even":  # as the error of one rounding
        r = 2 * 3**0.5 * (torch.rand(12, 4000, generator=torch.Generator().manual_seed(0)) - 0.5)
    log_p = c.spread_log_p(r.square().sum(0), torch.full((4000,), 12.0), 1.0)
    for level in (0.2, 0.05, 0.01):
        assert (log_p.exp() <= level).double().mean() <= level


def test_a_spread_over_what_rounding_leaves_is_evidence_whatever_its_signs():
    r = 3 * normal(16, 1)
    count = torch.tensor(16.0)
    assert c.spread_log_p(r.square().sum(), count, 1.0) < math.log(1e-10)
    assert c.spread_log_p(r.square().sum(), count, 4.0) == 0
    assert c.spread_log_p(torch.tensor(0.0), torch.tensor(0.0), 1.0) == 0
