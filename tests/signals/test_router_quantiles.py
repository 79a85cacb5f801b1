"""Quantiles from counts against sorted values: within two bins, as stated, and smooth."""

import math

import pytest
import torch

from mcore_monitors.signals.router import (
    ENTROPY_EDGES,
    MARGIN_EDGES,
    QuantileCounts,
    entropy_bins,
    margin_bins,
    quantile,
)

BINS = {ENTROPY_EDGES: entropy_bins, MARGIN_EDGES: margin_bins}


def upto(values, edges, parts=1):
    """Counts of several shares of the values, as micro-batches give them."""
    counts = QuantileCounts(1, 1, torch.device("cpu"))
    for part in values.chunk(parts):
        counts.add(torch.tensor([0]), *BINS[edges](part.view(1, 1, -1)))
    return counts.upto()[0, 0]


def quantiles(values, edges, q, parts=1):
    steps = torch.tensor(edges, dtype=torch.float64)
    return quantile(upto(values, edges, parts), torch.tensor(float(len(values))), steps, q).item()


def exact(values, q):
    return values.sort().values[max(0, math.ceil(q * len(values)) - 1)].item()


def uniform(count=3000):
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("edges", BINS, ids=["entropy", "margin"])
@pytest.mark.parametrize("power", [1, 9])
def test_counts_by_loop(edges, power):
    values = torch.cat([uniform(300) ** power, torch.tensor([0.0, 1.0, 1.5, 1e-7, 1 - 1e-6])])
    want = [0.0] * 128
    for v in values.double().tolist():
        for i in range(128):
            if v < edges[i]:
                want[i] += 1
            elif v < edges[i + 1]:
                want[i] += (edges[i + 1] - v) / (edges[i + 1] - edges[i])
    got = upto(values, edges)
    # a value just under 1 is known to 6e-8, which is a thousandth of the last entropy bin
    assert got.tolist() == pytest.approx(want, abs=5e-3)


@pytest.mark.parametrize("edges", BINS, ids=["entropy", "margin"])
def test_every_edge_is_where_it_should_be(edges):
    """A hair above an edge is in the bin that it begins; its upper edge is a whole width away."""
    bins, part = BINS[edges](torch.tensor(edges[1:-1]) * (1 + 2e-7))
    place = bins + 1 - part
    assert place.tolist() == pytest.approx(list(range(1, 128)), abs=5e-3)


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


def test_what_does_not_count_is_nan():
    values = uniform(100)
    padded = torch.cat([values, torch.full((30,), torch.nan)])
    assert torch.equal(upto(padded, ENTROPY_EDGES), upto(values, ENTROPY_EDGES))


def test_nothing_counted():
    edges = torch.tensor(ENTROPY_EDGES, dtype=torch.float64)
    nothing = quantile(torch.zeros(2, 128), torch.zeros(2), edges, 0.5)
    assert nothing.isnan().all()


def test_several_quantiles_at_once():
    values, edges = uniform(500), torch.tensor(ENTROPY_EDGES, dtype=torch.float64)
    counts = upto(values, ENTROPY_EDGES).expand(2, -1)
    both = torch.tensor([0.1, 0.9], dtype=torch.float64)
    got = quantile(counts, torch.tensor([500.0, 0.0]), edges, both)
    assert got[0].tolist() == [quantiles(values, ENTROPY_EDGES, q) for q in (0.1, 0.9)]
    assert got[1].isnan().all()


def test_every_row_may_have_edges_of_its_own():
    values, q = uniform(500), torch.tensor([0.1, 0.9], dtype=torch.float64)
    counts = torch.stack([upto(values, edges) for edges in BINS])
    edges = torch.tensor(list(BINS), dtype=torch.float64)
    got = quantile(counts, torch.tensor([500.0, 500.0]), edges, q)
    for row, name in zip(got, BINS, strict=True):
        assert row.tolist() == [quantiles(values, name, x) for x in (0.1, 0.9)]


def test_rows_and_kinds_are_apart():
    counts = QuantileCounts(3, 2, torch.device("cpu"))
    first, second = torch.full((2, 2), 3.0), torch.tensor([[5.0, 5.0], [7.0, 7.0]])
    counts.add(torch.tensor([2, 0]), torch.stack([first, second]), torch.zeros(2, 2, 2))
    counts.add(torch.tensor([1]), first[None, :1], torch.zeros(1, 1, 2))
    got = counts.upto()[..., -1]
    assert got.tolist() == [[2, 2], [2, 0], [2, 2]]
    assert counts.upto()[2, 0].tolist() == [0.0] * 4 + [2.0] * 124
    assert counts.upto()[2, 1].tolist() == [0.0] * 6 + [2.0] * 122
    counts.zero()
    assert not counts.upto().any()
