"""Quantiles from counts against sorted values: within two bins, as stated, and smooth."""

import math

import pytest
import torch

from mcore_monitors.signals.router import ENTROPY_EDGES, MARGIN_EDGES, count_upto, quantile


def tensor(edges):
    return torch.tensor([edges], dtype=torch.float64)


def quantiles(values, edges, q, parts=1):
    """Through counts of several shares of the values, as micro-batches and ranks give them."""
    upto = sum(count_upto(v.unsqueeze(0), tensor(edges)) for v in values.chunk(parts))
    return quantile(upto, torch.tensor([float(len(values))]), tensor(edges)[0], q).item()


def exact(values, q):
    return values.sort().values[max(0, math.ceil(q * len(values)) - 1)].item()


def uniform(count=3000):
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def test_counts_by_loop():
    edges = [0.0, 0.25, 0.5, 1.0]
    values = [0.1, 0.25, 0.3, 0.9, 1.0, 1.5]
    want = [0.0, 0.0, 0.0]
    for v in values:
        for i in range(3):
            if v < edges[i]:
                want[i] += 1
            elif v < edges[i + 1]:
                want[i] += (edges[i + 1] - v) / (edges[i + 1] - edges[i])
    got = count_upto(torch.tensor([values]), tensor(edges))[0]
    assert got.tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("power", [0.05, 0.3, 1.0, 4.0])
def test_entropy_within_a_bin(q, power):
    values = uniform() ** power
    got, want = quantiles(values, ENTROPY_EDGES, q, parts=7), exact(values, q)
    bin_width = 2 * math.sqrt(1 - min(got, want)) / 128 + 1 / 128**2
    assert abs(got - want) <= bin_width  # half of what is promised, as there are many tokens


@pytest.mark.parametrize("q", [0.05, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_margin_within_the_stated_width(q, scale):
    values = scale * uniform()
    got, want = quantiles(values, MARGIN_EDGES, q, parts=3), exact(values, q)
    assert abs(got - want) <= max(2e-6, 0.23 * want)
    assert abs(got - want) <= 0.03 * want


def test_few_tokens_stay_within_the_stated_width():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(1 + seed % 5, generator=generator)
        for q in (0.05, 0.5, 0.95):
            got = quantiles(values, ENTROPY_EDGES, q)
            # between two values any number is a median
            nearest = min(abs(got - v) for v in values.tolist())
            between = exact(values, q) <= got <= exact(values, q + 1e-6)
            assert between or nearest <= 2 * (2 / 128 + 1 / 128**2)


def test_a_value_that_crosses_an_edge_moves_nothing():
    values = uniform(100)
    before, after = values.clone(), values.clone()
    before[50], after[50] = ENTROPY_EDGES[40] - 1e-7, ENTROPY_EDGES[40] + 1e-7
    for q in (0.05, 0.5, 0.95):
        a, b = (quantiles(v, ENTROPY_EDGES, q) for v in (before, after))
        assert a == pytest.approx(b, abs=1e-6)


def test_shares_add_up_to_the_whole():
    values = uniform(1000)
    whole = quantiles(values, ENTROPY_EDGES, 0.3)
    assert quantiles(values, ENTROPY_EDGES, 0.3, parts=9) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.77, 0.999, 1.0, 1.0 + 1e-6])
def test_all_alike(value):
    got = quantiles(torch.full((50,), value), ENTROPY_EDGES, 0.5)
    assert got == pytest.approx(min(1, value), abs=1e-6)


def test_what_does_not_count_is_infinite():
    values = uniform(100)
    padded = torch.cat([values, torch.full((30,), torch.inf)]).unsqueeze(0)
    got = count_upto(padded, tensor(ENTROPY_EDGES))
    assert torch.equal(got, count_upto(values.unsqueeze(0), tensor(ENTROPY_EDGES)))


def test_nothing_counted():
    nothing = quantile(torch.zeros(2, 128), torch.zeros(2), tensor(ENTROPY_EDGES)[0], 0.5)
    assert nothing.isnan().all()
