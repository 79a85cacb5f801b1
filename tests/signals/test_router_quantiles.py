"""Quantiles from counts against sorted values: within the width of a bin, as stated."""

import math

import pytest
import torch

from mcore_monitors.signals.router import ENTROPY_EDGES, MARGIN_EDGES, count_below, quantile


def quantiles(values, edges, q, parts=1):
    """Through counts of several shares of the values, as micro-batches and ranks give them."""
    e = torch.tensor([edges], dtype=torch.float32)
    below = sum(count_below(v.unsqueeze(0), e) for v in values.chunk(parts))
    count = torch.tensor([float(len(values))])
    return quantile(below, count, torch.tensor(edges, dtype=torch.float64), q).item()


def exact(values, q):
    return values.sort().values[max(0, math.ceil(q * len(values)) - 1)].item()


@pytest.mark.parametrize("q", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("power", [0.05, 0.3, 1.0, 4.0])
def test_entropy_within_the_stated_width(q, power):
    values = torch.rand(3000, generator=torch.Generator().manual_seed(0)) ** power
    got, want = quantiles(values, ENTROPY_EDGES, q, parts=7), exact(values, q)
    highest = max(got, want)
    assert abs(got - want) <= 2 * math.sqrt(1 - min(got, want)) / 128 + 1 / 128**2, (got, want)
    assert 0 <= highest <= 1


@pytest.mark.parametrize("q", [0.05, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_margin_within_the_stated_width(q, scale):
    values = scale * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    got, want = quantiles(values, MARGIN_EDGES, q, parts=3), exact(values, q)
    assert abs(got - want) <= max(1e-6, 0.115 * want)


def test_shares_add_up_to_the_whole():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert quantiles(values, ENTROPY_EDGES, 0.3, parts=9) == quantiles(values, ENTROPY_EDGES, 0.3)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.0 + 1e-6])
def test_all_at_an_end(value):
    got = quantiles(torch.full((50,), value), ENTROPY_EDGES, 0.5)
    assert got == pytest.approx(value, abs=1 / 128)


def test_what_does_not_count_is_infinite():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([ENTROPY_EDGES])
    padded = torch.cat([values, torch.full((30,), torch.inf)]).unsqueeze(0)
    assert torch.equal(count_below(padded, edges), count_below(values.unsqueeze(0), edges))


def test_nothing_counted():
    below, edges = torch.zeros(2, len(ENTROPY_EDGES)), torch.tensor(ENTROPY_EDGES)
    assert quantile(below, torch.zeros(2), edges, 0.5).isnan().all()
